"""Messages as Flower records and back: equal values, no copy, and nothing that a receiver could write into."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, floating_dtypes, integer_dtypes

from fedlm.codec import coded
from fedlm.errors import DataError
from fedlm.flower_records import from_records, to_records


@coded
@dataclass(frozen=True)
class Parcel:
    """A message with an array and scalars."""

    values: npt.NDArray[Any]
    name: str = "a"
    count: int = 3


dtypes = st.one_of(floating_dtypes(sizes=(16, 32, 64)), integer_dtypes())


@given(values=dtypes.flatmap(lambda dtype: arrays(dtype, array_shapes(min_dims=0, min_side=0))))
def test_a_message_comes_back_as_it_was(values: npt.NDArray[Any]) -> None:
    records = RecordDict(to_records("it", Parcel(values)))
    back = from_records(Parcel, "it", records)
    reference = records.array_records["it.arrays"]["values"].numpy()
    assert (back.values.dtype, back.values.shape) == (reference.dtype, reference.shape)
    assert back.values.tobytes() == reference.tobytes()
    assert (back.name, back.count) == ("a", 3)


def test_arrays_are_read_only_views_of_the_records_bytes() -> None:
    records = RecordDict(to_records("it", Parcel(np.arange(1_000))))
    values = from_records(Parcel, "it", records).values
    data = np.frombuffer(records.array_records["it.arrays"]["values"].data, np.uint8)
    assert np.shares_memory(values, data)
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_files_that_are_not_plain_are_read_as_flwr_reads_them(version: tuple[int, int]) -> None:
    values = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    file = BytesIO()
    np.lib.format.write_array(file, values, version=version)
    array = Array("float64", (2, 3), "numpy.ndarray", file.getvalue())
    scalars = ConfigRecord({"name": "b", "count": 1})
    records = RecordDict({"it.arrays": ArrayRecord({"values": array}), "it.scalars": scalars})
    assert (from_records(Parcel, "it", records).values == values).all()


def test_a_pickled_array_is_refused() -> None:
    file = BytesIO()
    np.lib.format.write_array(file, np.array([{}], object), allow_pickle=True)
    array = Array("object", (1,), "numpy.ndarray", file.getvalue())
    records = RecordDict({"it.arrays": ArrayRecord({"values": array}), "it.scalars": ConfigRecord()})
    with pytest.raises(ValueError, match="allow_pickle"):
        from_records(Parcel, "it", records)


def test_a_truncated_array_is_refused() -> None:
    whole = Array(np.arange(9))
    array = Array(whole.dtype, whole.shape, whole.stype, whole.data[:-1])
    records = RecordDict({"it.arrays": ArrayRecord({"values": array}), "it.scalars": ConfigRecord()})
    with pytest.raises(ValueError, match="buffer"):
        from_records(Parcel, "it", records)


def whole() -> dict[str, Any]:
    return dict(to_records("it", Parcel(np.arange(9))))


def with_bytes(data: bytes) -> dict[str, Any]:
    return whole() | {"it.arrays": ArrayRecord({"values": Array("int64", (9,), "numpy.ndarray", data)})}


def lying_header(shape: tuple[int, ...], descr: str = "<i8") -> bytes:
    file = BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(72)


@pytest.mark.parametrize(
    "records",
    [
        {},
        {"it.scalars": whole()["it.scalars"]},
        {"it.arrays": whole()["it.arrays"]},
        {"it.arrays": whole()["it.scalars"], "it.scalars": whole()["it.arrays"]},
        whole() | {"it.scalars": ConfigRecord({"name": "b"})},
        whole() | {"it.scalars": ConfigRecord({"name": "b", "count": 3, "more": 1})},
        whole() | {"it.scalars": ConfigRecord({"name": "b", "count": 3.0})},
        whole() | {"it.scalars": ConfigRecord({"name": 1, "count": 3})},
        whole() | {"it.arrays": ArrayRecord({"values": Array(np.arange(9)), "count": Array(np.arange(9))})},
        with_bytes(b""),
        with_bytes(b"\x93NUMPY\x07\x00garbage"),
        with_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': '<i8',"),
        with_bytes(lying_header((10**15,))),
        with_bytes(lying_header((10**40,))),
        with_bytes(lying_header((-9,))),
        with_bytes(lying_header((3, 3, 0, 10**40))),
        with_bytes(lying_header((1,), "|V72")),
    ],
)
def test_whatever_is_wrong_with_a_message_is_one_data_error(records: dict[str, Any]) -> None:
    with pytest.raises(DataError) as refusal:
        from_records(Parcel, "it", RecordDict(records))
    assert "\n" not in str(refusal.value)


@given(data=st.data())
def test_bytes_that_were_changed_are_an_array_of_numbers_or_refused(data: st.DataObject) -> None:
    sent = bytearray(Array(np.arange(9)).data)
    for _ in range(data.draw(st.integers(1, 4))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    try:
        values = from_records(Parcel, "it", RecordDict(with_bytes(bytes(sent)))).values
    except DataError:
        return
    assert values.dtype.kind in "biufc"
    assert values.nbytes <= len(sent)
