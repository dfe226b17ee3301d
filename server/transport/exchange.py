"""One exchange with the nodes: work items go out, replies come in, what fails goes to another node.

Nodes take the next work item when they return one, so uneven devices balance themselves. Each work item is out at one
node at a time; a reply to a message that was given up is never read.

A work item that fails (an error reply, silence) is tried `MAX_ATTEMPTS` times, then the exchange ends: the work item
may be what is wrong. A reply that cannot be used (`server.reply_checks`) is the node's fault and costs the work item no
attempt: the node is left out of the run after a few (`server.nodes`), so there is an end to these too.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

from flwr.app import Message, RecordDict

from fedlm.errors import DataError, WorkerError
from fedlm.flower_records import Records, to_records
from fedlm.messages import EvaluateReply, TrainReply
from server.nodes import Nodes
from server.reply_checks import plain_line

Reply = TypeVar("Reply", bound=TrainReply | EvaluateReply)

IN_FLIGHT_PER_NODE = 2  # one running, one waiting, so that no node idles while its reply travels
MAX_ATTEMPTS = 4
POLL_S = 0.02
"""Shortest time between two questions for replies when there are none."""


@dataclass(frozen=True)
class ExchangeSpec:
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
class WorkItem:
    """A work item that is out, or waits to go out again."""

    index: int
    request: Any
    attempts: int = 0
    avoid: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Outgoing:
    """A message: what it asks, and the work items that have to be done again if it fails."""

    node: int
    message_type: str
    request: Any
    records: Records
    work_items: tuple[WorkItem, ...]


class Exchange(Generic[Reply]):
    """Sends requests whose replies stand for themselves, such as evaluations.

    Arguments:
        nodes: Who may get work; one that has work and is silent for longer than their time-out is given up for it.
        exchange_spec: What all messages share.
        requests: The work items, dataclasses of `fedlm.messages`.
        read: Makes the reply to a request of the records that came; raises `DataError` for what cannot be used.
        on_lost: Called with `(node, reason)` when a message has failed.
    """

    def __init__(
        self,
        nodes: Nodes,
        exchange_spec: ExchangeSpec,
        requests: Sequence[Any],
        *,
        read: Callable[[Any, RecordDict], Reply],
        on_lost: Callable[[int, str], None],
    ) -> None:
        self._nodes, self._exchange_spec, self._read, self._on_lost = nodes, exchange_spec, read, on_lost
        self._grid, self._timeout_s = nodes.grid, nodes.timeout_s
        self._waiting = deque(WorkItem(index, request) for index, request in enumerate(requests))
        self._sent: dict[str, Outgoing] = {}  # by message id, in the order of pushing
        self._load: Counter[int] = Counter()  # messages that a node has
        self._heard: dict[int, float] = {}  # when a node last replied, or got work while it had none

    def replies(self) -> Iterator[tuple[int, Reply]]:
        """Yield `(index of the request, reply)` in the order of arrival.

        A subclass may yield an index again; the later reply then replaces the earlier one.

        Raises:
            WorkerError: A work item failed too often, or there is no node, or none is left.
        """
        while True:
            self._push(list(self._next_work_items()))
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

    def _dress(self, node: int, work_item: WorkItem) -> Any:
        """Return the request as this node gets it."""
        return work_item.request

    def _accept(self, sent: Outgoing, content: RecordDict) -> Iterator[tuple[int, Reply]]:
        """Take in the reply to a message and yield what it answers.

        Raises:
            DataError: It cannot be used; nothing was taken in.
        """
        if reply := self._fresh(sent, content):
            yield sent.work_items[0].index, reply

    def _fresh(self, sent: Outgoing, content: RecordDict) -> Reply | None:
        """Return the reply to a work item; None if the node could not apply the patch and now gets the whole state."""
        reply = self._read(sent.request, content)
        if not reply.stale:
            return reply
        if sent.records is self._exchange_spec.whole:
            raise DataError("the node says that it is stale with the whole state, which fits any node")
        self._push([self._outgoing(sent.node, sent.work_items[0], self._exchange_spec.whole)])
        return None

    def _other_messages(self) -> Iterable[Outgoing]:
        """Return what has to be sent besides work items, once these have been given out."""
        return ()

    def _fail(self, sent: Outgoing, reason: str) -> None:
        """Count an attempt of the work items of a message that has failed, and have them done again."""
        self._redo(sent, reason)
        for work_item in sent.work_items:
            work_item.attempts += 1
            if work_item.attempts >= MAX_ATTEMPTS:
                raise WorkerError(f"a work item failed {work_item.attempts} times, last on node {sent.node}: {reason}")

    def _refuse(self, sent: Outgoing, reason: str) -> None:
        """Have the work items of a reply that cannot be used done again, and all of the node's if it is now left
        out."""
        self._redo(sent, self._nodes.refuse(sent.node, reason))
        if self._nodes.is_left_out(sent.node):
            for message_id, other in list(self._sent.items()):
                if other.node == sent.node:
                    self._forget(message_id)
                    self._again(other.work_items)

    def _redo(self, sent: Outgoing, reason: str) -> None:
        """Have the work items of a message done again, elsewhere if there is another node."""
        self._on_lost(sent.node, reason)
        for work_item in sent.work_items:
            work_item.avoid.add(sent.node)
        self._again(sent.work_items)

    def _forget(self, message_id: str) -> Outgoing:
        """Await no reply to a message any more."""
        sent = self._sent.pop(message_id)
        self._load[sent.node] -= 1
        return sent

    def _again(self, work_items: Sequence[WorkItem]) -> None:
        self._waiting.extendleft(reversed(work_items))

    def _next_work_items(self) -> Iterator[Outgoing]:
        """Give every node one work item before any gets a second."""
        if not self._waiting:
            return
        nodes = self._nodes.wait()
        given = Counter({node: self._load[node] for node in nodes})
        for limit in range(1, IN_FLIGHT_PER_NODE + 1):
            for node in nodes:
                if given[node] < limit and (work_item := self._pick(node, nodes)):
                    given[node] += 1
                    yield self._outgoing(node, work_item, self._exchange_spec.broadcast)

    def _pick(self, node: int, nodes: Sequence[int]) -> WorkItem | None:
        """Take the first work item that has not failed on this node (any, once it has failed on all)."""
        for position, work_item in enumerate(self._waiting):
            if node not in work_item.avoid or work_item.avoid.issuperset(nodes):
                del self._waiting[position]
                return work_item
        return None

    def _outgoing(self, node: int, work_item: WorkItem, broadcast: Records) -> Outgoing:
        return Outgoing(node, self._exchange_spec.message_type, self._dress(node, work_item), broadcast, (work_item,))

    def _push(self, outgoing: Sequence[Outgoing]) -> None:
        if not outgoing:
            return
        messages = [
            Message(
                RecordDict({**one.records, **to_records("request", one.request)}),
                dst_node_id=one.node,
                message_type=one.message_type,
                group_id=self._exchange_spec.group_id,
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

    def _settle(self, reply: Message) -> Iterator[tuple[int, Reply]]:
        if reply.metadata.reply_to_message_id not in self._sent:
            return  # given up meanwhile, or answered twice
        sent = self._forget(reply.metadata.reply_to_message_id)
        self._heard[sent.node] = time.monotonic()
        if reply.has_error():
            self._fail(sent, plain_line(reply.error.reason) or f"error {reply.error.code}")
            return
        try:
            yield from self._accept(sent, reply.content)
        except DataError as error:
            self._refuse(sent, plain_line(error))

    def _give_up_silent_nodes(self) -> None:
        now = time.monotonic()
        for message_id, sent in list(self._sent.items()):
            if now - self._heard[sent.node] > self._timeout_s:
                self._forget(message_id)
                self._fail(sent, f"no reply within {self._timeout_s:.0f} s")
