"""Messages of `fedlm.messages` as Flower records.

The one module of this package that imports flwr (its public part); server and clients import it, the rest of fedlm
never does.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, ConfigRecordValues, MetricRecord, RecordDict

from fedlm.codec import join, split
from fedlm.errors import DataError

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

    Raises:
        DataError: A record or field is missing, unknown or of a wrong type, or the bytes of an array are no array.
    """
    arrays, scalars = records.get(f"{name}.arrays"), records.get(f"{name}.scalars")
    if not isinstance(arrays, ArrayRecord) or not isinstance(scalars, ConfigRecord):
        raise DataError(f"message has {sorted(records)}, must have {name}.arrays and {name}.scalars, of their types")
    views = {key: _view(array, f"{name}.arrays {key!r}") for key, array in arrays.items()}
    return join(cls, views, dict(scalars), where=f"message {name!r}")


def _view(array: Array, where: str) -> npt.NDArray[Any]:
    """Return `array.numpy()`, which copies, as a view of the bytes.

    Raises:
        DataError: They are no .npy file of numbers, or of another size than its header says.
    """
    file = BytesIO(array.data)  # shares the bytes
    try:
        read_header = _HEADERS[np.lib.format.read_magic(file)]
        shape, fortran_order, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError("objects need allow_pickle, which runs what was sent")
        if min(shape, default=0) < 0:
            raise ValueError(f"shape {shape}")
        values = np.frombuffer(array.data, dtype, offset=file.tell()) if 0 not in shape else np.empty(0, dtype)
        return values.reshape(shape, order="F" if fortran_order else "C")
    except Exception as error:  # numpy parses the header as Python: any kind may come of garbage
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise DataError(f"{where} of {len(array.data):,} bytes is no array ({reason}); send an .npy file") from error
