"""Large array records in Ray's object store: once for all messages of a group that carry the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flwr.app import ArrayRecord

_Key = tuple[tuple[str, str, tuple[int, ...], str, int], ...]


class _Entry(NamedTuple):
    reference: Any
    buffers: list[bytes]  # held, so that the ids in the key stay theirs
    num_bytes: int


class BroadcastStore:
    """Remembers which records of the current message group are in the object store.

    A record is recognised by the identity of its arrays' bytes, which cannot change: two records that share
    their arrays are stored once, and one that was changed in place is stored again.

    Arguments:
        put: Stores a record and returns its reference; `ray.put`.
    """

    def __init__(self, put: Callable[[ArrayRecord], Any]) -> None:
        self._put = put
        self._group_id: str | None = None
        self._entries: dict[_Key, _Entry] = {}

    def enter(self, group_id: str) -> None:
        """Begin a message of a group; references of other groups are dropped, messages in flight keep theirs."""
        if group_id != self._group_id:
            self._entries.clear()
            self._group_id = group_id

    def reference(self, record: ArrayRecord) -> Any:
        """Return the reference of a record, storing it if this group has not carried it yet."""
        key = tuple((name, a.dtype, tuple(a.shape), a.stype, id(a.data)) for name, a in record.items())
        if key not in self._entries:
            buffers = [array.data for array in record.values()]
            self._entries[key] = _Entry(self._put(record), buffers, sum(map(len, buffers)))
        return self._entries[key].reference

    def clear(self) -> None:
        """Drop every reference."""
        self._entries.clear()

    def num_bytes(self) -> int:
        """Return the bytes of the records that this store holds."""
        return sum(entry.num_bytes for entry in self._entries.values())
