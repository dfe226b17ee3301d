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
