"""Every piece is in the sum exactly once, whatever nodes, processes and messages do.

The network here is a model: nodes with the clients' own partial sums, queues, and a schedule of everything that can go
wrong, from Ray's lost workers to what Flower's SuperLink may do (processes that change between messages, replies that
never come, come late, or in another order). What runs on real processes is in test_engine.py and tests/simulations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.partial_sum import KeptSum
from fedlm.codec import to_text
from fedlm.errors import WorkerError
from fedlm.flower_records import from_records, to_records
from fedlm.messages import FlushRequest, PartialSum, TrainReply, TrainRequest
from fedlm.privacy.clipper import Clipper
from fedlm.randomness import seed_key, stream
from server import exchange as exchange_module
from server.dispatch import Dispatcher
from server.exchange import Order
from simulations.grids.base import LocalGrid
from simulations.grids.flower_private import APP_ERROR, WORKER_LOST, error_reply

SIZE, CLIP_NORM, TIMEOUT_S = 5, 0.3, 10.0
NOTHING = np.empty(0)
ORDER = Order("train", "1", {}, dict)
ACTIONS = ("work", "wait", "crash", "vanish", "raise", "last first", "lose reply", "forget", "be stale")


def update_of(device: int) -> np.ndarray:
    return stream(seed_key(1), "update", device).standard_normal(SIZE).astype(np.float32)


def requests_for(num_pieces: int) -> list[TrainRequest]:
    """Pieces of one to three devices each."""
    devices = [np.arange(3 * i, 3 * i + 1 + i % 3) for i in range(num_pieces)]
    return [TrainRequest(d, np.array([len(d)]), to_text(Clipper(CLIP_NORM))) for d in devices]


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
        self.kept = KeptSum()

    def handle(self, message: Message, *, raises: bool = False, stale: bool = False) -> Message:
        """Do what `clients.app` does with updates that are ready made."""
        if message.metadata.message_type == "train.flush":
            flush = from_records(FlushRequest, "request", message.content)
            return Message(RecordDict(to_records("sum", self.kept.flush(flush.sum_name))), reply_to=message)
        request = from_records(TrainRequest, "request", message.content)
        reply = TrainReply(stale, request.devices, NOTHING, NOTHING, NOTHING.astype(np.int64), [], 0.0)
        records = to_records("reply", reply)
        if not stale:
            with self.kept.piece(request, SIZE) as total:
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
            node.kept = KeptSum()
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
    """Trains `num_pieces` pieces of some devices on a grid and keeps what came."""

    def __init__(self, grid: LocalGrid, num_pieces: int) -> None:
        requests = requests_for(num_pieces)
        self.devices = [request.devices for request in requests]
        self.total = Clipper(CLIP_NORM).new_sum(SIZE)
        self.counted: list[int] = []
        self.losses: list[str] = []
        dispatcher = Dispatcher(grid, TIMEOUT_S, lambda node, reason: self.losses.append(reason))
        self.replies = {
            index: from_records(TrainReply, "reply", content).devices.tolist()
            for index, content in dispatcher.train(ORDER, requests, self.take)
        }

    def take(self, partial: PartialSum) -> None:
        fields = {"clip_norm": CLIP_NORM, "num_devices": partial.num_devices}
        self.total.add_sum(Clipper(CLIP_NORM).sum_from_arrays(partial.total, fields))
        self.counted += partial.pieces.tolist()

    def assert_exact(self) -> None:
        """Every piece once, and the bits of a plain loop over all devices."""
        plain = Clipper(CLIP_NORM).new_sum(SIZE)
        for device in np.concatenate([np.empty(0, np.int64), *self.devices]).tolist():
            plain.add(update_of(device))
        assert sorted(self.counted) == list(range(len(self.devices)))
        assert self.total.to_arrays()[0].tolist() == plain.to_arrays()[0].tolist()
        assert self.total.num_devices == plain.num_devices
        assert self.replies == {i: d.tolist() for i, d in enumerate(self.devices)}


@pytest.fixture(autouse=True, scope="module")
def clock() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange_module, "time", Clock())
        yield


schedules = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3)), max_size=60)


@settings(max_examples=400, deadline=None)
@given(schedule=schedules, num_nodes=st.integers(1, 4), num_pieces=st.integers(0, 9), remembers=st.booleans())
def test_every_piece_counts_once_whatever_fails(
    schedule: list[tuple[str, int]], num_nodes: int, num_pieces: int, remembers: bool
) -> None:
    grid = FaultyGrid(num_nodes, schedule, remembers=remembers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange_module, "MAX_ATTEMPTS", 1000)
        Result(grid, num_pieces).assert_exact()


@settings(max_examples=100, deadline=None)
@given(schedule=schedules, num_nodes=st.integers(1, 4), num_pieces=st.integers(5, 9))
def test_a_round_that_gives_up_has_counted_nothing_twice(
    schedule: list[tuple[str, int]], num_nodes: int, num_pieces: int
) -> None:
    try:
        Result(FaultyGrid(num_nodes, schedule, remembers=True), num_pieces).assert_exact()
    except WorkerError as error:
        assert "failed 4 times" in str(error)  # noqa: PT017  both ends are right; which one, the schedule decides


@pytest.mark.parametrize("num_pieces", [1, 2, 3, 12])
@pytest.mark.parametrize("remembers", [True, False])
def test_an_undisturbed_round_costs_a_message_a_piece_and_one_flush_a_node(num_pieces: int, remembers: bool) -> None:
    grid = FaultyGrid(2, [], remembers=remembers)
    Result(grid, num_pieces).assert_exact()
    flushes = 2 if remembers and num_pieces > 2 else 0  # else every reply carries its sum
    assert next(grid._message_numbers) - 1 == num_pieces + flushes


def test_a_late_piece_of_a_silent_node_is_not_counted_again() -> None:
    """Node 0 falls silent with two pieces, they are done elsewhere, and then it finishes them and is used again."""
    silent = [("work", 1)] * 2 + [("wait", 0)] * int(3 * TIMEOUT_S / exchange_module.POLL_S)
    grid = FaultyGrid(2, [*silent, ("work", 0), ("work", 0), ("work", 0), ("work", 1)], remembers=True)
    result = Result(grid, 6)
    result.assert_exact()
    assert any("no reply within" in reason for reason in result.losses)


def test_a_piece_that_always_fails_ends_the_round() -> None:
    with pytest.raises(WorkerError, match=r"failed 4 times.*MemoryError"):
        Result(FaultyGrid(2, [("raise", i) for i in range(100)], remembers=True), 3)


def test_a_sum_of_a_former_exchange_is_never_taken() -> None:
    """A server that is interrupted and started again meets nodes that still hold its former sums."""
    grid = FaultyGrid(2, [], remembers=True)
    interrupted = Dispatcher(grid, TIMEOUT_S, lambda node, reason: None).train(
        ORDER, requests_for(5), lambda sum_: None
    )
    assert {next(interrupted)[0] for _ in range(3)} == {0, 1, 2}
    interrupted.close()  # type: ignore[attr-defined]
    Result(grid, 5).assert_exact()


def test_a_node_that_claims_more_devices_than_it_was_asked_for_is_not_believed() -> None:
    """The bound on a sum's norm grows with its devices; for absent ones too, one device could move the mean far."""

    class Boaster(Node):
        def handle(self, message: Message, *, raises: bool = False, stale: bool = False) -> Message:
            reply = super().handle(message, raises=raises, stale=stale)
            partial = from_records(PartialSum, "sum", reply.content)
            boasted = replace(partial, num_devices=partial.num_devices + 1)
            return Message(RecordDict({**reply.content, **to_records("sum", boasted)}), reply_to=message)

    grid = FaultyGrid(1, [], remembers=False)
    grid.nodes[10] = Boaster()
    with pytest.raises(WorkerError, match="claims"):
        Result(grid, 3)
