"""What a broken or dishonest node may send in place of a reply: the records of a real reply with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

Mutation = Callable[[np.random.Generator, RecordDict], RecordDict]
WRONG_SCALARS = ("", "many", -1, 2**40, 0.5, float("nan"), float("inf"), b"\0", True, [1], [0.5], ["a"])


def npy(shape: str, *, descr: str = "<i8", version: bytes = b"\x01\x00", data: bytes = b"\0" * 8) -> bytes:
    """Return a .npy file with a header that says anything."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + data


def pickled() -> bytes:
    """Return an array of objects as a file."""
    file = BytesIO()
    np.lib.format.write_array(file, np.array([{}], object), allow_pickle=True)
    return file.getvalue()


LYING_FILES = (
    b"", b"\0" * 64, b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{'descr'", pickled(),
    npy("(1099511627776,)"), npy("(2, 9223372036854775807)"), npy("(-1,)"), npy("(99999999999999999999999,)"),
    npy("(0, 1099511627776)", data=b""), npy("(1,)", descr="|V0"), npy("(1,)", descr="<q7"), npy("(1,)", descr="<f3"),
    npy("(" * 500 + ")" * 500), npy("(1,)", version=b"\x03\x00"), npy("(1,) * 10**9"), npy("(1,)", data=b"\0" * 7),
    npy("(1,)", data=b"\0" * 9), npy("(" + "1," * 40 + ")"),
)  # fmt: skip


def one_of(rng: np.random.Generator, things: Any) -> Any:
    """Return one of some things."""
    things = list(things)
    return things[int(rng.integers(len(things)))]


def rebuilt(content: RecordDict, name: str, record: Any) -> RecordDict:
    """Return a reply with one record exchanged, or without it."""
    records = {**content, name: record}
    return RecordDict({key: value for key, value in records.items() if value is not None})


def arrays_of(rng: np.random.Generator, content: RecordDict) -> tuple[str, dict[str, Array], str]:
    """Return a record of arrays, its arrays, and the name of one of them."""
    name = one_of(rng, content.array_records)
    arrays = dict(content.array_records[name])
    return name, arrays, one_of(rng, arrays)


def with_array(rng: np.random.Generator, content: RecordDict, change: Callable[[np.ndarray], np.ndarray]) -> RecordDict:
    """Return a reply with one array changed."""
    name, arrays, field = arrays_of(rng, content)
    arrays[field] = Array(change(arrays[field].numpy()))
    return rebuilt(content, name, ArrayRecord(arrays))


def no_record(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """Leave a record out."""
    return rebuilt(content, one_of(rng, content), None)


def other_record(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """Send a record of another kind under its name."""
    return rebuilt(content, one_of(rng, content), MetricRecord({"a": 1.0}))


def no_field(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """Leave a field out."""
    name = one_of(rng, content)
    record: Any = dict(content[name])
    del record[one_of(rng, record)]
    return rebuilt(content, name, type(content[name])(record))


def more_fields(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """Send a field that nobody knows, of a name that is long."""
    name = one_of(rng, content.config_records)
    return rebuilt(content, name, ConfigRecord({**content.config_records[name], "x" * 10_000: 1}))


def other_scalar(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """Send a scalar that is no such figure."""
    name = one_of(rng, content.config_records)
    record = dict(content.config_records[name])
    field = one_of(rng, record)
    wrong = [v for v in WRONG_SCALARS if not _may_be(field, v)]
    return rebuilt(content, name, ConfigRecord({**record, field: one_of(rng, wrong)}))


def _may_be(field: str, value: Any) -> bool:
    """Whether a value is one that an honest node could send; causes of nothing, and a figure of memory."""
    return (field == "stale" and value is True) or (field == "peak_mb" and value == 0.5)


def other_file(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """Send bytes that are no array, or one that lies about its size."""
    name, arrays, field = arrays_of(rng, content)
    arrays[field] = Array("int64", (1,), "numpy.ndarray", one_of(rng, LYING_FILES))
    return rebuilt(content, name, ArrayRecord(arrays))


def cut_file(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """Cut a file anywhere."""
    name, arrays, field = arrays_of(rng, content)
    old = arrays[field]
    end = int(rng.integers(len(old.data)))
    arrays[field] = Array(old.dtype, old.shape, old.stype, old.data[:end])
    return rebuilt(content, name, ArrayRecord(arrays))


def other_stype(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """Say that the bytes are something else."""
    name, arrays, field = arrays_of(rng, content)
    old = arrays[field]
    arrays[field] = Array(old.dtype, old.shape, "pickle", old.data)
    return rebuilt(content, name, ArrayRecord(arrays))


def other_dtype(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """Send the same numbers in a type that was not agreed on."""
    return with_array(rng, content, lambda a: a.astype(one_of(rng, ["<f4", "<i4", ">i8", ">f8", "<c16", "|b1", "<u8"])))


def other_shape(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """Send a matrix, or a number, in place of a vector."""
    return with_array(rng, content, lambda a: one_of(rng, [a[None], a[:, None], np.zeros((), a.dtype)]))


def other_length(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """Send more than was asked for: a repeated device or work item, a longer sum."""
    return with_array(rng, content, lambda a: np.concatenate([a, a[-1:], np.ones(1, a.dtype)]))


def other_ids(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """Name devices or work items that were not asked for."""
    name = one_of(rng, content.array_records)
    arrays = dict(content.array_records[name])
    field = "devices" if "devices" in arrays else "work_items"
    wrong = one_of(rng, [-1, 10**6, 2**63 - 1, -(2**63)])
    arrays[field] = Array(np.full_like(arrays[field].numpy(), wrong))
    return rebuilt(content, name, ArrayRecord(arrays))


def too_large(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """Send a sum that no honest devices have, or norms that nobody can have."""
    name = one_of(rng, content.array_records)
    arrays = dict(content.array_records[name])
    if name == "sum.arrays":
        arrays["total"] = Array(np.full(len(arrays["total"].numpy()) + 1, -(2**63), np.int64))
    else:
        bad = one_of(rng, [np.nan, -1.0, np.inf])
        arrays["non_private_norms"] = Array(np.full(len(arrays["devices"].numpy()), bad))
    return rebuilt(content, name, ArrayRecord(arrays))


MALFORMED: tuple[Mutation, ...] = (
    no_record, other_record, no_field, more_fields, other_scalar, other_file, cut_file, other_stype, other_dtype,
    other_shape, other_length, other_ids, too_large,
)  # fmt: skip
"""What can never be used."""


def other_bytes(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """Change some bytes of a file: the result may have the right form, and then it is a lie that nobody can see."""
    name, arrays, field = arrays_of(rng, content)
    old = arrays[field]
    data = bytearray(old.data)
    for place in rng.integers(len(data), size=int(rng.integers(1, 9))):
        data[place] = int(rng.integers(256))
    arrays[field] = Array(old.dtype, old.shape, old.stype, bytes(data))
    return rebuilt(content, name, ArrayRecord(arrays))


def other_sum(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """Change numbers of the reply's arrays at will."""

    def change(a: np.ndarray) -> np.ndarray:
        if a.dtype.kind == "i":
            return rng.integers(-(2**62), 2**62, a.shape) >> int(rng.integers(62))
        return rng.choice([np.nan, np.inf, -1.0, 0.0, 1e308], a.shape)

    return with_array(rng, content, change)


def other_count(rng: np.random.Generator, content: RecordDict) -> RecordDict:
    """Claim another number of devices, or a long cause with control characters."""
    name = one_of(rng, content.config_records)
    record = dict(content.config_records[name])
    if "num_devices" in record:
        return rebuilt(content, name, ConfigRecord({**record, "num_devices": int(rng.integers(-2, 12))}))
    return rebuilt(content, name, ConfigRecord({**record, "causes": ["\x1b[2J\n" * 10_000] * int(rng.integers(3))}))


ANYTHING: tuple[Mutation, ...] = (*MALFORMED, other_bytes, other_sum, other_count)
