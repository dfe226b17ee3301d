"""How messages travel between the server and a node: pickle protocol 5, the bytes of arrays out of band.

flwr's `Array` holds `bytes`, which pickle would copy into its stream. Importing this module registers another
way to pickle `Array`, which offers them as a buffer: Ray writes them straight into its object store, and `clone`
shares them. Large array records are *detached*: they travel as objects of their own, once for all messages that
carry them.
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict

from simulations.grids.flower_private import copy_metadata, rebuild_message

Record = ArrayRecord | ConfigRecord | MetricRecord

DETACH_BYTES = 65_536
"""Array records from this size on travel as objects of their own; smaller ones inside the message."""


def _rebuild_array(dtype: str, shape: tuple[int, ...], stype: str, buffer: Any) -> Array:
    view = memoryview(buffer)
    owner = view.obj
    # bytes cannot change: in one process both sides share them
    data = owner if isinstance(owner, bytes) and len(owner) == view.nbytes else view.tobytes()
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


def _reduce_array(array: Array) -> tuple[Callable[..., Array], tuple[Any, ...]]:
    return _rebuild_array, (array.dtype, tuple(array.shape), array.stype, pickle.PickleBuffer(array.data))


copyreg.pickle(Array, _reduce_array)


def clone(message: Message) -> Message:
    """Return an independent copy of a message that shares only the immutable bytes of its arrays.

    A node may then change what it received without changing what another node, or the server, holds.
    """
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    copied: Message = pickle.loads(stream, buffers=buffers)
    return copied


@dataclass(frozen=True)
class Parcel:
    """A message whose large array records are replaced by their position among the detached ones."""

    metadata: Metadata
    content: dict[str, Record | int]


def detach(message: Message) -> tuple[Parcel, list[ArrayRecord]]:
    """Split a message into a small parcel and the large array records that it carried.

    Arguments:
        message: Is not changed; the parcel has its own copy of the metadata.

    Returns:
        The parcel, and the records of at least `DETACH_BYTES` bytes in the order of their keys.
    """
    content: dict[str, Record | int] = {}
    detached: list[ArrayRecord] = []
    for key, record in message.content.items():
        if isinstance(record, ArrayRecord) and record.count_bytes() >= DETACH_BYTES:
            content[key] = len(detached)
            detached.append(record)
        else:
            content[key] = record
    return Parcel(copy_metadata(message.metadata), content), detached


def attach(parcel: Parcel, detached: Sequence[ArrayRecord]) -> Message:
    """Return the message that `detach` took apart."""
    records = {key: detached[record] if isinstance(record, int) else record for key, record in parcel.content.items()}
    return rebuild_message(parcel.metadata, RecordDict(records))
