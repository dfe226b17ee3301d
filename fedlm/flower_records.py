"""Messages of `fedlm.messages` as Flower records.

The one module of this package that imports flwr (its public part); server and clients import it, the rest of fedlm
never does.
"""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, ConfigRecordValues, MetricRecord, RecordDict

from fedlm.messages import pack, unpack

Message = TypeVar("Message")
Records: TypeAlias = dict[str, ArrayRecord | MetricRecord | ConfigRecord]


def to_records(name: str, message: Any) -> Records:
    """Return the two records of a message, `<name>.arrays` and `<name>.scalars`."""
    arrays, scalars = pack(message)
    return {
        f"{name}.arrays": ArrayRecord({key: Array(np.ascontiguousarray(a)) for key, a in arrays.items()}),
        f"{name}.scalars": ConfigRecord({k: cast(ConfigRecordValues, v) for k, v in scalars.items()}),
    }


def from_records(cls: type[Message], name: str, records: RecordDict) -> Message:
    """Rebuild the message of class `cls` that `to_records(name, ...)` packed; its arrays are read-only, not copied."""
    arrays = {key: _view(array) for key, array in records.array_records[f"{name}.arrays"].items()}
    return unpack(cls, arrays, dict(records.config_records[f"{name}.scalars"]))


def _view(array: Array) -> npt.NDArray[Any]:
    """Return `array.numpy()`, which copies, as a view of the bytes; whatever is not plain is left to flwr to judge."""
    head = BytesIO(array.data)  # shares the bytes
    if array.stype != "numpy.ndarray" or np.lib.format.read_magic(head) != (1, 0):
        return array.numpy()
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(head)
    if fortran_order or dtype.hasobject:
        return array.numpy()
    return np.frombuffer(array.data, dtype, math.prod(shape), head.tell()).reshape(shape)
