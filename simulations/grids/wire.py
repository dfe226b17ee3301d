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
from typing import Any, NamedTuple

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
    copied: Message = unpack(pack(message))
    return copied


class Packed(NamedTuple):
    """An object as bytes, and beside them the bytes of its arrays."""

    stream: bytes
    buffers: list[pickle.PickleBuffer]


def pack(item: Any) -> Packed:
    """Pickle an object; ten times faster than Ray's own pickler, which looks for functions and classes to send."""
    buffers: list[pickle.PickleBuffer] = []
    return Packed(pickle.dumps(item, protocol=5, buffer_callback=buffers.append), buffers)


def unpack(packed: Packed) -> Any:
    """Return the object that `pack` took apart."""
    return pickle.loads(packed.stream, buffers=packed.buffers)


def share(record: ArrayRecord) -> ArrayRecord:
    """Return a record of its own that shares the immutable bytes of its arrays."""
    return ArrayRecord({k: Array(a.dtype, tuple(a.shape), a.stype, a.data) for k, a in record.items()})


@dataclass(frozen=True)
class DetachedMessage:
    """A message whose large array records are replaced by their position among the detached ones."""

    metadata: Metadata
    content: dict[str, Record | int]

    def renumbered(self, places: Sequence[int]) -> DetachedMessage:
        """Return the detached message whose i-th detached record is the `places[i]`-th of a larger collection."""
        if list(places) == list(range(len(places))):
            return self
        content = {key: places[r] if isinstance(r, int) else r for key, r in self.content.items()}
        return DetachedMessage(self.metadata, content)


def detach(message: Message) -> tuple[DetachedMessage, list[ArrayRecord]]:
    """Split a message into a small detached message and the large array records that it carried.

    Arguments:
        message: Is not changed; the detached message has its own copy of the metadata.

    Returns:
        The detached message, and the records of at least `DETACH_BYTES` bytes in the order of their keys.
    """
    content: dict[str, Record | int] = {}
    detached: list[ArrayRecord] = []
    for key, record in message.content.items():
        if isinstance(record, ArrayRecord) and record.count_bytes() >= DETACH_BYTES:
            content[key] = len(detached)
            detached.append(record)
        else:
            content[key] = record
    return DetachedMessage(copy_metadata(message.metadata), content), detached


def attach(detached_message: DetachedMessage, detached: Sequence[ArrayRecord]) -> Message:
    """Return the message that `detach` took apart; what the app does to it does not reach `detached`."""
    records = {
        key: share(detached[record]) if isinstance(record, int) else record
        for key, record in detached_message.content.items()
    }
    return rebuild_message(detached_message.metadata, RecordDict(records))
