"""A model network: nodes with the clients' own partial sums, queues, and a schedule of what goes wrong."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from clients.node_sum import NodeSum
from fedlm.codec import to_text
from fedlm.flower_records import from_records, to_records
from fedlm.messages import FlushRequest, PartialSum, TrainReply, TrainRequest
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.clipping.clipped_sum import new_sum
from fedlm.randomness import seed_key, stream
from server import nodes as nodes_module
from server.transport import exchange as exchange_module
from server.transport.dispatch import Dispatcher
from server.transport.exchange import ExchangeSpec
from simulations.grids.base import LocalGrid
from simulations.grids.flower_private import APP_ERROR, WORKER_LOST, error_reply

SIZE, CLIP_NORM, TIMEOUT_S = 5, 0.3, 10.0
NOTHING = np.empty(0)
WHOLE = "whole"  # names a record that only the whole state has
EXCHANGE_SPEC = ExchangeSpec("train", "1", {}, lambda: {WHOLE: ConfigRecord()})


def update_of(device: int) -> np.ndarray:
    return stream(seed_key(1), "update", device).standard_normal(SIZE).astype(np.float32)


def requests_for(num_work_items: int) -> list[TrainRequest]:
    """Work items of one to three devices each."""
    devices = [np.arange(3 * i, 3 * i + 1 + i % 3) for i in range(num_work_items)]
    return [TrainRequest(d, np.array([len(d)]), to_text(ClipSpec(CLIP_NORM))) for d in devices]


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.01)


class Node:
    """One node: messages that it has not looked at, and its partial sum."""

    def __init__(self) -> None:
        self.queue: deque[Message] = deque()
        self.kept = NodeSum()

    def handle(self, message: Message, *, raises: bool = False, stale: bool = False) -> Message:
        """Do what `clients.app` does with updates that are ready made."""
        if message.metadata.message_type == "train.flush":
            flush = from_records(FlushRequest, "request", message.content)
            return Message(RecordDict(to_records("sum", self.kept.flush(flush.sum_name))), reply_to=message)
        request = from_records(TrainRequest, "request", message.content)
        stale = stale and WHOLE not in message.content  # which fits any node
        reply = TrainReply(stale, request.devices, NOTHING, NOTHING, NOTHING.astype(np.int64), [], 0.0)
        records = to_records("reply", reply)
        if not stale:
            with self.kept.work_item(request, SIZE) as total:
                for device in request.devices.tolist():
                    total.add(update_of(device))
                if raises:
                    raise MemoryError
            if request.flush:
                records |= to_records("sum", self.kept.flush(request.sum_name))
        return Message(RecordDict(records), reply_to=message)


class FaultyGrid(LocalGrid):
    """Carries out one scheduled action at each pull; when the schedule has ended every node just works."""

    def __init__(self, num_nodes: int, schedule: list[tuple[str, int]], *, remembers: bool) -> None:
        super().__init__()
        self.nodes_remember = remembers
        self.nodes = {10 + index: Node() for index in range(num_nodes)}
        self.arrived: dict[str, Message] = {}
        self.schedule = deque(schedule)

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(self._stamp(message))
            self.nodes[message.metadata.dst_node_id].queue.append(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        if self.schedule:
            action, number = self.schedule.popleft()
            self.act(action, self.nodes[10 + number % len(self.nodes)])
        else:
            for node in self.nodes.values():
                self.act("work", node)
        return [self.arrived.pop(i) for i in message_ids if i in self.arrived]

    def close(self) -> None:
        pass

    def act(self, action: str, node: Node) -> None:
        if action in {"crash", "vanish", "forget"}:
            node.kept = NodeSum()
        if action in {"crash", "vanish"}:
            while node.queue:
                lost = node.queue.popleft()
                if action == "crash":
                    self.arrive(error_reply(lost.metadata, WORKER_LOST, "worker lost"))
        if action not in {"work", "raise", "last first", "lose reply", "be stale"} or not node.queue:
            return
        message = node.queue.pop() if action == "last first" else node.queue.popleft()
        try:
            reply = node.handle(message, raises=action == "raise", stale=action == "be stale")
        except MemoryError:
            reply = error_reply(message.metadata, APP_ERROR, "MemoryError")
        if action != "lose reply":
            self.arrive(reply)

    def arrive(self, reply: Message) -> None:
        self.arrived[reply.metadata.reply_to_message_id] = reply


class Result:
    """Trains `num_work_items` work items of some devices on a grid and keeps what came."""

    def __init__(self, grid: LocalGrid, num_work_items: int) -> None:
        requests = requests_for(num_work_items)
        self.devices = [request.devices for request in requests]
        self.total = new_sum(ClipSpec(CLIP_NORM), SIZE)
        self.counted: list[int] = []
        self.losses: list[str] = []
        dispatcher = Dispatcher(grid, TIMEOUT_S, lambda node, reason: self.losses.append(reason))
        self.replies = {
            index: reply.devices.tolist() for index, reply in dispatcher.train(EXCHANGE_SPEC, requests, self.take)
        }

    def take(self, partial: PartialSum) -> None:
        fields = {"clip_norm": CLIP_NORM, "num_devices": partial.num_devices}
        self.total.add_arrays(partial.total, fields)
        self.counted += partial.work_items.tolist()

    def assert_exact(self) -> None:
        """Every work item once, and the bits of a plain loop over all devices."""
        plain = new_sum(ClipSpec(CLIP_NORM), SIZE)
        for device in np.concatenate([np.empty(0, np.int64), *self.devices]).tolist():
            plain.add(update_of(device))
        assert sorted(self.counted) == list(range(len(self.devices)))
        assert self.total.to_arrays()[0].tolist() == plain.to_arrays()[0].tolist()
        assert self.total.num_devices == plain.num_devices
        assert self.replies == {i: d.tolist() for i, d in enumerate(self.devices)}


@contextmanager
def model_time() -> Iterator[None]:
    """Let the server's time be that of the model."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(exchange_module, "time", clock)
        patch.setattr(nodes_module, "time", clock)
        yield
