"""Messages of `fedlm.messages` as Flower records.

The one module of this package that imports flwr (its public part); server and clients import it, the rest of fedlm
never does.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, ConfigRecordValues, MetricRecord, RecordDict

from fedlm.codec import join, split
from fedlm.errors import DataError

# A header as numpy writes it, for numbers. `numpy.lib.format` evaluates the text that came, and then allocates by it.
_HEADER = re.compile(
    rb"\x93NUMPY(?:\x01\x00..|\x02\x00....)\{'descr': '(?P<descr>[<>|=]?[a-zA-Z]\d{0,2})', "
    rb"'fortran_order': (?P<fortran>True|False), 'shape': \((?P<shape>(?:\d{1,19}, ?)*(?:\d{1,19})?)\), \} *\n",
    re.DOTALL,
)
_LONGEST_HEADER, _MOST_DIMENSIONS = 2048, 32
Message = TypeVar("Message")
Records: TypeAlias = dict[str, ArrayRecord | MetricRecord | ConfigRecord]

_LONGEST_REASON = 200  # characters; what numpy says may quote the whole header
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def to_records(name: str, message: Any) -> Records:
    """Return the two records of a message, `<name>.arrays` and `<name>.scalars`."""
    arrays, scalars = split(message)
    return {
        f"{name}.arrays": ArrayRecord({key: Array(np.ascontiguousarray(a)) for key, a in arrays.items()}),
        f"{name}.scalars": ConfigRecord({k: cast(ConfigRecordValues, v) for k, v in scalars.items()}),
    }


def from_records(cls: type[Message], name: str, records: RecordDict) -> Message:
    """Rebuild the message of class `cls` that `to_records(name, ...)` split; its arrays are read-only, not copied.

    Nothing is allocated by what the sender says of sizes, so a message costs no more than the bytes that came.

    Raises:
        DataError: Records, fields or arrays are missing or are not what such a message has.
    """
    arrays, scalars = records.get(f"{name}.arrays"), records.get(f"{name}.scalars")
    if not isinstance(arrays, ArrayRecord) or not isinstance(scalars, ConfigRecord):
        raise DataError(f"the records '{name}.arrays' and '{name}.scalars' of a {cls.__name__} are missing")
    views = {str(key): _view(str(key), array) for key, array in arrays.items()}
    return join(cls, views, dict(scalars), where=f"message {name!r}")


def _view(name: str, array: Array) -> npt.NDArray[Any]:
    """Return an array that travels as a .npy file (of version 1 or 2) as a view of the file's bytes."""
    file = array.data
    if array.stype != "numpy.ndarray" or not isinstance(file, bytes):
        raise DataError(f"array '{name}' is a {str(array.stype)[:40]!r}, must be the bytes of a numpy.ndarray")
    head = _HEADER.match(file[:_LONGEST_HEADER])
    if head is None:
        raise DataError(f"array '{name}' does not begin like a .npy file of plain numbers")
    kind = head["descr"].decode()
    if "O" in kind:
        raise DataError(f"array '{name}' holds pickled objects; they are never loaded (allow_pickle = False)")
    try:
        dtype = np.dtype(kind)
    except TypeError as error:
        raise DataError(f"array '{name}' is of the unknown type {kind!r}") from error
    shape = tuple(int(n) for n in head["shape"].split(b",") if n.strip())
    count, start = math.prod(shape), head.end()
    if len(shape) > _MOST_DIMENSIONS or count * dtype.itemsize != len(file) - start:
        raise DataError(f"array '{name}' claims {dtype} {shape[:4]}, but its buffer has {len(file) - start:,} bytes")
    order: Literal["C", "F"] = "F" if head["fortran"] == b"True" else "C"
    return np.frombuffer(file, dtype, count, start).reshape(shape, order=order)
