"""One exchange with the nodes: pieces of work go out, replies come in, what fails goes to another node.

Nodes take the next piece when they return one, so uneven devices balance themselves. Each piece is out at one node at
a time; a reply to a message that was given up is never read.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedlm.errors import WorkerError
from fedlm.flower_records import Records, to_records

IN_FLIGHT_PER_NODE = 2  # one running, one waiting, so that no node idles while its reply travels
MAX_ATTEMPTS = 4
POLL_S = 0.02
"""Shortest time between two questions for replies when there are none."""


@dataclass(frozen=True)
class Order:
    """What all messages of an exchange share.

    Arguments:
        message_type: Which handler of the ClientApp, "train" or "evaluate".
        group_id: Names the round.
        broadcast: The records that every message carries, shared.
        full_broadcast: Makes the records for a node that could not apply the patch.
    """

    message_type: str
    group_id: str
    broadcast: Records
    full_broadcast: Callable[[], Records]

    @cached_property
    def whole(self) -> Records:
        """The records of `full_broadcast`, made once."""
        return self.full_broadcast()


@dataclass
class Piece:
    """A piece of work that is out, or waits to go out again."""

    index: int
    request: Any
    attempts: int = 0
    avoid: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Outgoing:
    """A message: what it asks, and the pieces that have to be done again if it fails."""

    node: int
    message_type: str
    request: Any
    records: Records
    pieces: tuple[Piece, ...]


class Exchange:
    """Sends requests whose replies stand for themselves, such as evaluations.

    Arguments:
        grid: Any Flower grid.
        order: What all messages share.
        requests: The pieces of work, dataclasses of `fedlm.messages`.
        timeout_s: A node that has work and is silent for longer is given up for that work.
        on_lost: Called with `(node, reason)` when a message has failed.
    """

    def __init__(
        self,
        grid: Grid,
        order: Order,
        requests: Sequence[Any],
        *,
        timeout_s: float,
        on_lost: Callable[[int, str], None],
    ) -> None:
        self._grid, self._order, self._timeout_s, self._on_lost = grid, order, timeout_s, on_lost
        self._waiting = deque(Piece(index, request) for index, request in enumerate(requests))
        self._sent: dict[str, Outgoing] = {}  # by message id, in the order of pushing
        self._load: Counter[int] = Counter()  # messages that a node has
        self._heard: dict[int, float] = {}  # when a node last replied, or got work while it had none

    def replies(self) -> Iterator[tuple[int, RecordDict]]:
        """Yield `(index of the request, reply)` in the order of arrival.

        A subclass may yield an index again; the later reply then replaces the earlier one.

        Raises:
            WorkerError: A piece failed on every node that tried it, or there is no node.
        """
        while True:
            self._push(list(self._next_pieces()))
            self._push(list(self._other_messages()))
            if not self._sent:
                return
            started = time.monotonic()
            replies = list(self._grid.pull_messages(list(self._sent)))
            for reply in replies:
                yield from self._settle(reply)
            if not replies:
                self._give_up_silent_nodes()
                time.sleep(max(0.0, started + POLL_S - time.monotonic()))  # some grids wait themselves

    def _dress(self, node: int, piece: Piece) -> Any:
        """Return the request as this node gets it."""
        return piece.request

    def _accept(self, sent: Outgoing, content: RecordDict) -> Iterator[tuple[int, RecordDict]]:
        """Take in the reply to a message and yield what it answers."""
        yield sent.pieces[0].index, content

    def _other_messages(self) -> Iterable[Outgoing]:
        """Return what has to be sent besides pieces, once these have been given out."""
        return ()

    def _fail(self, sent: Outgoing, reason: str) -> None:
        """Have the pieces of a failed message done again, elsewhere if there is another node."""
        self._on_lost(sent.node, reason)
        for piece in sent.pieces:
            piece.attempts += 1
            piece.avoid.add(sent.node)
            if piece.attempts >= MAX_ATTEMPTS:
                raise WorkerError(f"a piece of work failed {piece.attempts} times, last on node {sent.node}: {reason}")
        self._again(sent.pieces)

    def _again(self, pieces: Sequence[Piece]) -> None:
        self._waiting.extendleft(reversed(pieces))

    def _next_pieces(self) -> Iterator[Outgoing]:
        """Give every node one piece before any gets a second."""
        if not self._waiting:
            return
        nodes = wait_for_nodes(self._grid, self._timeout_s)
        given = Counter({node: self._load[node] for node in nodes})
        for limit in range(1, IN_FLIGHT_PER_NODE + 1):
            for node in nodes:
                if given[node] < limit and (piece := self._pick(node, nodes)):
                    given[node] += 1
                    yield self._outgoing(node, piece, self._order.broadcast)

    def _pick(self, node: int, nodes: Sequence[int]) -> Piece | None:
        """Take the first piece that has not failed on this node (any, once it has failed on all)."""
        for position, piece in enumerate(self._waiting):
            if node not in piece.avoid or piece.avoid.issuperset(nodes):
                del self._waiting[position]
                return piece
        return None

    def _outgoing(self, node: int, piece: Piece, broadcast: Records) -> Outgoing:
        return Outgoing(node, self._order.message_type, self._dress(node, piece), broadcast, (piece,))

    def _push(self, outgoing: Sequence[Outgoing]) -> None:
        if not outgoing:
            return
        messages = [
            Message(
                RecordDict({**one.records, **to_records("request", one.request)}),
                dst_node_id=one.node,
                message_type=one.message_type,
                group_id=self._order.group_id,
            )
            for one in outgoing
        ]
        message_ids = list(self._grid.push_messages(messages))
        if len(message_ids) != len(messages):
            raise WorkerError(f"the grid took {len(message_ids)} of {len(messages)} messages; is one too large for it?")
        for message_id, one in zip(message_ids, outgoing, strict=True):
            self._sent[message_id] = one
            if not self._load[one.node]:
                self._heard[one.node] = time.monotonic()
            self._load[one.node] += 1

    def _settle(self, reply: Message) -> Iterator[tuple[int, RecordDict]]:
        sent = self._sent.pop(reply.metadata.reply_to_message_id)
        self._load[sent.node] -= 1
        self._heard[sent.node] = time.monotonic()
        if reply.has_error():
            self._fail(sent, reply.error.reason or f"error {reply.error.code}")
        elif _is_stale(reply.content):
            self._push([self._outgoing(sent.node, sent.pieces[0], self._order.whole)])
        else:
            yield from self._accept(sent, reply.content)

    def _give_up_silent_nodes(self) -> None:
        now = time.monotonic()
        for message_id, sent in list(self._sent.items()):
            if now - self._heard[sent.node] > self._timeout_s:
                del self._sent[message_id]
                self._load[sent.node] -= 1
                self._fail(sent, f"no reply within {self._timeout_s:.0f} s")


def wait_for_nodes(grid: Grid, timeout_s: float) -> list[int]:
    """Return the ids of the nodes, waiting for the first one until the time-out.

    Raises:
        WorkerError: None came.
    """
    deadline = time.monotonic() + timeout_s
    while not (nodes := sorted(grid.get_node_ids())):
        if time.monotonic() > deadline:
            raise WorkerError(f"no node joined within {timeout_s:.0f} s; start clients, then run again")
        time.sleep(0.2)
    return nodes


def _is_stale(content: RecordDict) -> bool:
    scalars = content.get("reply.scalars")
    return isinstance(scalars, ConfigRecord) and bool(scalars.get("stale"))
