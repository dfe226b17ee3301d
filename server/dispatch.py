"""Hands work to nodes and collects replies, over any Flower `Grid`.

Nodes take the next piece when they return one, so uneven devices balance themselves. A piece whose node was lost is
given to another node; since a reply is an exact sum, neither order nor retries can change the result, and a piece is
counted once however often it was tried.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlm.errors import WorkerError
from fedlm.flower_records import Records, to_records

IN_FLIGHT_PER_NODE = 2  # one running, one waiting, so that no node idles while its reply travels
MAX_ATTEMPTS = 4
POLL_S = 0.02


@dataclass
class _Piece:
    """A piece of work that is out, or waits to go out again."""

    index: int
    request: Any
    attempts: int = 0
    avoid: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Sent:
    piece: _Piece
    node: int
    deadline: float


class Dispatcher:
    """Sends requests to nodes.

    Arguments:
        grid: Any Flower grid.
        timeout_s: A node that holds a piece for longer is given up for that piece.
        on_lost: Called with `(node, reason)` when a piece has to be done again.
    """

    def __init__(self, grid: Grid, timeout_s: float, on_lost: Callable[[int, str], None]) -> None:
        self._grid = grid
        self._timeout_s = timeout_s
        self._on_lost = on_lost

    def wait_for_nodes(self) -> list[int]:
        """Return the ids of the nodes, waiting for the first one until the time-out."""
        deadline = time.monotonic() + self._timeout_s
        while not (nodes := sorted(self._grid.get_node_ids())):
            if time.monotonic() > deadline:
                raise WorkerError(f"no node joined within {self._timeout_s:.0f} s; start clients, then run again")
            time.sleep(0.2)
        return nodes

    def run(
        self,
        message_type: str,
        requests: Sequence[Any],
        *,
        group_id: str,
        broadcast: Records,
        full_broadcast: Callable[[], Records],
    ) -> Iterator[tuple[int, RecordDict]]:
        """Yield `(index of the request, reply)` in the order of arrival.

        Arguments:
            message_type: "train" or "evaluate".
            requests: The pieces of work, dataclasses of `fedlm.messages`.
            group_id: Names the round.
            broadcast: The records that every message of the round carries, shared.
            full_broadcast: Makes the records for a node that could not apply the patch.

        Raises:
            WorkerError: A piece failed on every node that tried it.
        """
        waiting = deque(_Piece(i, request) for i, request in enumerate(requests))
        sent: dict[str, _Sent] = {}
        load: dict[int, int] = {}
        full: Records | None = None
        while waiting or sent:
            for node in self.wait_for_nodes() if waiting else ():
                while waiting and load.get(node, 0) < IN_FLIGHT_PER_NODE:
                    piece = self._pick(waiting, node, len(load))
                    if piece is None:
                        break
                    message_id = self._push(node, message_type, piece.request, group_id, broadcast)
                    sent[message_id] = _Sent(piece, node, time.monotonic() + self._timeout_s)
                    load[node] = load.get(node, 0) + 1
            arrived = False
            for reply in self._grid.pull_messages(list(sent)):
                arrived = True
                entry = sent.pop(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    load[entry.node] -= 1
                    self._retry(entry, reply.error.reason or f"error {reply.error.code}", waiting)
                elif reply.content.config_records["reply.scalars"]["stale"]:
                    full = full or full_broadcast()
                    message_id = self._push(entry.node, message_type, entry.piece.request, group_id, full)
                    sent[message_id] = _Sent(entry.piece, entry.node, time.monotonic() + self._timeout_s)
                else:
                    load[entry.node] -= 1
                    yield entry.piece.index, reply.content
            for message_id in [m for m, entry in sent.items() if time.monotonic() > entry.deadline]:
                entry = sent.pop(message_id)
                load[entry.node] -= 1
                self._retry(entry, f"no reply within {self._timeout_s:.0f} s", waiting)
            if not arrived:
                time.sleep(POLL_S)

    def _pick(self, waiting: deque[_Piece], node: int, num_nodes: int) -> _Piece | None:
        """Take the first piece that has not failed on this node (any, once it has failed everywhere)."""
        for position, piece in enumerate(waiting):
            if node not in piece.avoid or len(piece.avoid) >= num_nodes:
                del waiting[position]
                return piece
        return None

    def _retry(self, entry: _Sent, reason: str, waiting: deque[_Piece]) -> None:
        piece = entry.piece
        piece.attempts += 1
        piece.avoid.add(entry.node)
        self._on_lost(entry.node, reason)
        if piece.attempts >= MAX_ATTEMPTS:
            raise WorkerError(f"a piece of work failed {piece.attempts} times, last on node {entry.node}: {reason}")
        waiting.appendleft(piece)

    def _push(self, node: int, message_type: str, request: Any, group_id: str, broadcast: Records) -> str:
        content = RecordDict({**broadcast, **to_records("request", request)})
        message = Message(content, dst_node_id=node, message_type=message_type, group_id=group_id)
        message_ids: Iterable[str] = self._grid.push_messages([message])
        return next(iter(message_ids))
