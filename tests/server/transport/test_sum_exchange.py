"""Every work item is in the sum exactly once, whatever nodes, processes and messages do.

The network is a model (`model_network`) and a schedule of everything that can go wrong, from Ray's lost workers to what
Flower's SuperLink may do (processes that change between messages, replies that never come, come late, or in another
order). What runs on real processes is in test_engine.py and tests/simulations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from flwr.app import Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from model_network import EXCHANGE_SPEC, TIMEOUT_S, FaultyGrid, Node, Result, model_time, requests_for

from fedlm.errors import WorkerError
from fedlm.flower_records import from_records, to_records
from fedlm.messages import PartialSum
from server.transport import exchange as exchange_module
from server.transport.dispatch import Dispatcher

ACTIONS = ("work", "wait", "crash", "vanish", "raise", "last first", "lose reply", "forget", "be stale")


@pytest.fixture(autouse=True, scope="module")
def clock() -> Iterator[None]:
    with model_time():
        yield


schedules = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3)), max_size=60)


@settings(max_examples=400, deadline=None)
@given(schedule=schedules, num_nodes=st.integers(1, 4), num_work_items=st.integers(0, 9), remembers=st.booleans())
def test_every_work_item_counts_once_whatever_fails(
    schedule: list[tuple[str, int]], num_nodes: int, num_work_items: int, remembers: bool
) -> None:
    grid = FaultyGrid(num_nodes, schedule, remembers=remembers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange_module, "MAX_ATTEMPTS", 1000)
        Result(grid, num_work_items).assert_exact()


@settings(max_examples=100, deadline=None)
@given(schedule=schedules, num_nodes=st.integers(1, 4), num_work_items=st.integers(5, 9))
def test_a_round_that_gives_up_has_counted_nothing_twice(
    schedule: list[tuple[str, int]], num_nodes: int, num_work_items: int
) -> None:
    try:
        Result(FaultyGrid(num_nodes, schedule, remembers=True), num_work_items).assert_exact()
    except WorkerError as error:
        assert "failed 4 times" in str(error)  # noqa: PT017  both ends are right; which one, the schedule decides


@pytest.mark.parametrize("num_work_items", [1, 2, 3, 12])
@pytest.mark.parametrize("remembers", [True, False])
def test_an_undisturbed_round_costs_a_message_a_work_item_and_one_flush_a_node(
    num_work_items: int, remembers: bool
) -> None:
    grid = FaultyGrid(2, [], remembers=remembers)
    Result(grid, num_work_items).assert_exact()
    flushes = 2 if remembers and num_work_items > 2 else 0  # else every reply carries its sum
    assert next(grid._message_numbers) - 1 == num_work_items + flushes


def test_a_late_work_item_of_a_silent_node_is_not_counted_again() -> None:
    """Node 0 falls silent with two work items, they are done elsewhere, and then it finishes them and is used again."""
    silent = [("work", 1)] * 2 + [("wait", 0)] * int(3 * TIMEOUT_S / exchange_module.POLL_S)
    grid = FaultyGrid(2, [*silent, ("work", 0), ("work", 0), ("work", 0), ("work", 1)], remembers=True)
    result = Result(grid, 6)
    result.assert_exact()
    assert any("no reply within" in reason for reason in result.losses)


def test_a_work_item_that_always_fails_ends_the_round() -> None:
    with pytest.raises(WorkerError, match=r"failed 4 times.*MemoryError"):
        Result(FaultyGrid(2, [("raise", i) for i in range(100)], remembers=True), 3)


def test_a_sum_of_a_former_exchange_is_never_taken() -> None:
    """A server that is interrupted and started again meets nodes that still hold its former sums."""
    grid = FaultyGrid(2, [], remembers=True)
    interrupted = Dispatcher(grid, TIMEOUT_S, lambda node, reason: None).train(
        EXCHANGE_SPEC, requests_for(5), lambda sum_: None
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
