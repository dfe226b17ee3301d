"""A node that sends anything but an honest reply costs the run nothing: the sum is that of the honest nodes."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from bad_replies import ANYTHING, LYING_FILES, MALFORMED, Mutation, one_of
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from model_network import CLIP_NORM, SIZE, FaultyGrid, Node, Result, model_time

from fedlm.errors import DataError, WorkerError
from fedlm.flower_records import from_records, to_records
from fedlm.messages import PartialSum, TrainReply, TrainRequest
from server import nodes as nodes_module
from server.nodes import MAX_REFUSED
from server.reply_checks import MAX_TEXT, read_sum

NUM_MALFORMED, NUM_ANYTHING = 8_000, 2_000


@pytest.fixture(autouse=True, scope="module")
def clock() -> Iterator[None]:
    with model_time():
        yield


class Liar(Node):
    """A node that changes its replies before it sends them."""

    def __init__(self, rng: np.random.Generator, mutations: tuple[Mutation, ...]) -> None:
        super().__init__()
        self.rng, self.mutations, self.count = rng, mutations, 0

    def handle(self, message: Message, *, raises: bool = False, stale: bool = False) -> Message:
        honest = super().handle(message, raises=raises, stale=stale)
        self.count += 1
        return Message(one_of(self.rng, self.mutations)(self.rng, honest.content), reply_to=message)


def grid_with_liars(
    rng: np.random.Generator, mutations: tuple[Mutation, ...], *, num_honest: int
) -> tuple[FaultyGrid, list[Liar]]:
    """One to four liars, and honest nodes before, between or after them."""
    liars = [Liar(rng, mutations) for _ in range(int(rng.integers(1, 5)))]
    grid = FaultyGrid(num_honest + len(liars), [], remembers=bool(rng.integers(2)))
    for node, liar in zip(rng.permutation(list(grid.nodes)).tolist(), liars, strict=False):
        grid.nodes[node] = liar
    return grid, liars


def test_malformed_replies_leave_the_sum_of_the_honest_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of them is used, and each liar is left out after some."""
    monkeypatch.setattr(nodes_module, "MAX_REFUSED", most := 12)
    rng, count = np.random.default_rng(1), 0
    while count < NUM_MALFORMED:
        grid, liars = grid_with_liars(rng, MALFORMED, num_honest=1)
        result = Result(grid, int(rng.integers(6, 25)))
        result.assert_exact()
        refused = [reason for reason in result.losses if "cannot be used" in reason]
        sent = sum(liar.count for liar in liars)
        assert min(sent, 1) <= len(refused) == len(result.losses) <= most * len(liars)
        assert all(reason.isprintable() and len(reason) < MAX_TEXT + 200 for reason in result.losses)
        count += sent


def test_any_reply_counts_each_work_item_once_and_stays_within_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lies of the right form cannot be seen; they end nothing, and a device weighs no more than the clip norm."""
    monkeypatch.setattr(nodes_module, "MAX_REFUSED", 50)
    rng, count = np.random.default_rng(2), 0
    while count < NUM_ANYTHING:
        grid, liars = grid_with_liars(rng, ANYTHING, num_honest=1)
        result = Result(grid, int(rng.integers(6, 25)))
        num_devices = sum(map(len, result.devices))
        vector = result.total.to_arrays()[0].astype(float) * CLIP_NORM / 2**40
        assert sorted(result.counted) == list(range(len(result.devices)))
        assert result.replies.keys() == set(range(len(result.devices)))
        assert result.total.num_devices <= num_devices
        assert np.linalg.norm(vector) <= num_devices * CLIP_NORM
        count += sum(liar.count for liar in liars)


@pytest.mark.parametrize("remembers", [True, False])
def test_a_run_of_liars_alone_ends_with_one_clear_line(remembers: bool) -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        grid = FaultyGrid(3, [], remembers=remembers)
        liars = [Liar(rng, MALFORMED) for _ in range(3)]
        grid.nodes = dict(zip(grid.nodes, liars, strict=True))
        with pytest.raises(
            WorkerError, match="no node is left: each of 3 sent 3 replies that cannot be used"
        ) as caught:
            Result(grid, 9)
        assert str(caught.value).isprintable()
        assert sum(liar.count for liar in liars) <= 3 * (MAX_REFUSED + 2)  # with what was out when it was left out


@pytest.mark.parametrize("remembers", [True, False])
def test_a_node_that_is_stale_for_ever_is_left_out(remembers: bool) -> None:
    class Stale(Node):
        def handle(self, message: Message, *, raises: bool = False, stale: bool = False) -> Message:
            reply = super().handle(message)
            if "reply.scalars" not in reply.content:
                return reply
            scalars = ConfigRecord({**reply.content.config_records["reply.scalars"], "stale": True})
            return Message(RecordDict({**reply.content, "reply.scalars": scalars}), reply_to=message)

    grid = FaultyGrid(2, [], remembers=remembers)
    grid.nodes[10] = Stale()
    result = Result(grid, 9)
    result.assert_exact()
    assert "gets no more work" in result.losses[-1]
    grid = FaultyGrid(1, [], remembers=remembers)
    grid.nodes[10] = Stale()
    with pytest.raises(WorkerError, match="stale with the whole state"):
        Result(grid, 3)


def test_a_flush_that_claims_to_be_stale_loses_no_work_item() -> None:
    class Stale(Node):
        def handle(self, message: Message, *, raises: bool = False, stale: bool = False) -> Message:
            reply = super().handle(message)
            claim = {"reply.scalars": ConfigRecord({"stale": True})}
            is_flush = "reply.scalars" not in reply.content
            return Message(RecordDict({**reply.content, **(claim if is_flush else {})}), reply_to=message)

    grid = FaultyGrid(1, [], remembers=True)
    grid.nodes[10] = Stale()
    Result(grid, 9).assert_exact()


def test_a_reply_to_nothing_is_not_read() -> None:
    grid = FaultyGrid(1, [], remembers=False)
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: [reply for one in pull(ids) for reply in (one, one)]  # type: ignore[method-assign]
    Result(grid, 4).assert_exact()


def test_an_honest_but_strange_reply_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses that are not finite and long causes come from devices' data: refusing them would tell about the data."""
    handle = Node.handle

    def strange(self: Node, message: Message, *, raises: bool = False, stale: bool = False) -> Message:
        content = handle(self, message, raises=raises, stale=stale).content
        if "reply.arrays" not in content:
            return Message(content, reply_to=message)
        request = from_records(TrainRequest, "request", message.content)
        losses, norms = np.full(len(request.devices), math.nan), np.zeros(len(request.devices))
        reply = TrainReply(False, request.devices, norms, losses, np.empty(0, np.int64), [], 0.0)
        return Message(RecordDict({**content, **to_records("reply", reply)}), reply_to=message)

    monkeypatch.setattr(Node, "handle", strange)
    result = Result(FaultyGrid(2, [], remembers=True), 9)
    result.assert_exact()
    assert not result.losses


@pytest.mark.parametrize("file", LYING_FILES, ids=range(len(LYING_FILES)))
def test_a_lying_header_costs_no_memory(file: bytes) -> None:
    honest = to_records("sum", PartialSum(np.arange(2), np.zeros(SIZE, np.int64), 2))
    arrays = {**honest["sum.arrays"], "total": Array("int64", (1,), "numpy.ndarray", file)}
    records = RecordDict({**honest, "sum.arrays": ArrayRecord(arrays)})  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"array 'total'|PartialSum\.total"):
            read_sum([], records)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
