"""Grids: the same app gives the same replies on all of them, and losing workers loses no message silently."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

import simulations
from fedlm.errors import ConfigError, WorkerError
from simulations.grids import flower_private
from simulations.grids import ray_session as ray_session_module
from simulations.grids.base import LocalGrid
from simulations.grids.inprocess import InProcessGrid
from simulations.grids.ray_grid import RayGrid
from simulations.grids.ray_session import RaySession, available_cores, store_capacity
from simulations.grids.ray_worker import load_client_app

toy_app = ClientApp()
_weights: dict[str, np.ndarray] = {}

SHARED = {
    "embedding": np.arange(60_000, dtype=np.float32).reshape(200, 300),
    "bias": np.ones(3, np.float16),
}
RUN_CONFIG = {"rounds": 2, "rate": 0.5, "name": "toy", "private": True}
TIMEOUT_S = 5.0
NUM_WORKERS = 2


def set_up(shared: Mapping[str, np.ndarray]) -> None:
    """Keep the shared arrays, as a real client does with its frozen weights."""
    _weights.update(shared)


@toy_app.train()
def train(message: Message, context: Context) -> Message:
    """Double every array, count this node's messages, and spoil the received message."""
    state = context.state.setdefault("count", ConfigRecord({"messages": 0}))
    assert isinstance(state, ConfigRecord)
    state["messages"] = int(str(state["messages"])) + 1
    doubled = ArrayRecord({k: Array(np.asarray(a.numpy() * 2)) for k, a in message.content["arrays"].items()})
    facts = ConfigRecord({**context.run_config, **context.node_config, **state, "run": context.run_id})
    reply = Message(RecordDict({"arrays": doubled, "facts": facts}), reply_to=message)
    message.content["arrays"].clear()
    return reply


@toy_app.query("about")
def about(message: Message, context: Context) -> Message:
    """Describe this process and the arrays that `set_up` received."""
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/plasma" in line]
    regions = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps]
    in_store = [any(low <= a.ctypes.data < high for low, high in regions) for a in _weights.values()]
    facts = ConfigRecord(
        {
            "pid": os.getpid(),
            "niceness": os.nice(0),
            "threads": os.environ.get("OMP_NUM_THREADS", ""),
            "keeps_memory": os.environ.get("MALLOC_TRIM_THRESHOLD_", ""),
            "names": sorted(_weights),
            "sum": float(sum(a.sum(dtype=np.float64) for a in _weights.values())),
            "writeable": any(a.flags.writeable for a in _weights.values()),
            "in_store": bool(_weights) and all(in_store),
        }
    )
    return Message(RecordDict({"facts": facts}), reply_to=message)


@toy_app.query("fail")
def fail(message: Message, context: Context) -> Message:
    """Raise what the message asks for."""
    kinds = {"value": ValueError("no such row: 7\nsecond line"), "interrupt": KeyboardInterrupt()}
    raise kinds[str(message.content["facts"]["kind"])]


@toy_app.query("wrong")
def wrong(message: Message, context: Context) -> Message:
    """Break the contract of a ClientApp."""
    return None  # type: ignore[return-value]


@toy_app.query("hang")
def hang(message: Message, context: Context) -> Message:
    """Say that the work has begun, and never end it."""
    Path(str(message.content["facts"]["marker"])).touch()
    time.sleep(3600)
    raise AssertionError


def _message(node_id: int, message_type: str = "query.about", group_id: str = "1", **facts: str | int) -> Message:
    return Message(RecordDict({"facts": ConfigRecord(dict(facts))}), node_id, message_type, group_id=group_id)


def _with_arrays(node_id: int, record: ArrayRecord, group_id: str = "1") -> Message:
    return Message(RecordDict({"arrays": record}), node_id, "train", group_id=group_id)


def _arrays(seed: int) -> ArrayRecord:
    rng = np.random.default_rng(seed)
    arrays = [
        rng.normal(size=(300, 200)).astype(np.float32),  # large enough for the object store
        rng.integers(-9, 9, size=7),
        np.full((), 3.5),
        np.zeros((0, 4), np.float16),
    ]
    return ArrayRecord({f"block.{i}": Array(array) for i, array in enumerate(arrays)})


def _until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def _descendants(root: int) -> dict[int, str]:
    """Return pid and start time of every living process below `root`."""
    table: dict[int, tuple[int, str]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            table[int(stat.parent.name)] = (int(fields[1]), fields[19])
    found: dict[int, str] = {}
    layer = {root}
    while layer:
        layer = {pid for pid, (parent, _) in table.items() if parent in layer}
        found.update({pid: table[pid][1] for pid in layer})
    return found


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def _alive(processes: dict[int, str]) -> list[int]:
    def born(pid: int) -> str:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] == "Z" else fields[19]

    return [pid for pid, start in processes.items() if born(pid) == start]


_DRIVER = """
import sys
sys.path[:0] = {paths!r}
from {module} import RUN_CONFIG, _message
from simulations.grids.ray_grid import RayGrid

if __name__ == "__main__":
    with RayGrid(app="{module}:toy_app", num_workers=1, run_config=RUN_CONFIG) as grid:
        [node_id] = grid.get_node_ids()
        grid.send_and_receive([_message(node_id, "query.hang", marker={marker!r})])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_a_driver_that_is_ended_in_mid_message(tmp_path: Path, number: signal.Signals) -> None:
    marker = tmp_path / "working"
    script = tmp_path / "driver.py"
    paths = [str(Path(simulations.__file__).parents[1]), str(Path(__file__).parent)]
    script.write_text(_DRIVER.format(paths=paths, module=Path(__file__).stem, marker=str(marker)))
    log = tmp_path / "log"
    with log.open("w") as stream:
        driver = subprocess.Popen([sys.executable, script], stderr=stream, start_new_session=True)
    try:
        _until(lambda: marker.exists() or driver.poll() is not None, "the worker's message", 90)
        assert driver.poll() is None, log.read_text()
        processes = _descendants(driver.pid)
        if number is signal.SIGINT:
            os.killpg(driver.pid, number)  # as a terminal does
        else:  # no code of ours runs: Ray's two agents take a minute to notice, the rest ends at once
            processes = {pid: born for pid, born in processes.items() if "Agent" not in _command(pid)}
            driver.kill()
        assert len(processes) >= 3  # Ray's two servers and the worker, at least
        assert driver.wait(timeout=30) == -number
    finally:
        driver.kill()
        driver.wait()
    _until(lambda: not _alive(processes), "the end of all processes", 15)
    if number is signal.SIGINT:
        assert log.read_text().rstrip().endswith("KeyboardInterrupt")


@pytest.fixture(scope="module")
def ray_session() -> Iterator[RaySession[None]]:
    """Ray is started once for this file; its grids join it and have to leave it running."""
    if available_cores() < NUM_WORKERS:
        pytest.skip(f"these tests need {NUM_WORKERS} processor cores")
    session = RaySession(address="", store_bytes=store_capacity(0), on_connect=lambda ray: None)
    session.wait()
    yield session
    session.close()


def _broken_set_up(shared: Mapping[str, np.ndarray]) -> None:
    raise RuntimeError("no table")


def test_a_failing_setup_is_reported_at_first_use(ray_session: RaySession[None]) -> None:
    with (
        RayGrid(app=f"{__name__}:toy_app", setup=_broken_set_up, num_workers=1, run_config={}) as grid,
        pytest.raises(WorkerError, match=r"node 2 could not start: RuntimeError: no table"),
    ):
        grid.push_messages([_message(2)])


def _slow_set_up(shared: Mapping[str, np.ndarray]) -> None:
    time.sleep(60)


def test_a_start_that_takes_too_long_says_what_it_waits_for_and_what_to_do(
    ray_session: RaySession[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_session_module, "NOTE_EVERY_S", 0.2)
    notes: list[str] = []
    with RayGrid(
        app=f"{__name__}:toy_app",
        setup=_slow_set_up,
        num_workers=1,
        run_config={},
        start_timeout_s=3,
        note=notes.append,
    ) as grid:
        grid.get_node_ids()  # Ray itself is there
        with pytest.raises(WorkerError) as caught:
            grid.push_messages([_message(2)])
    start, *fixes = str(caught.value).split("; ")
    assert start == "worker 1 of 1 did not start within execution.start_timeout_s = 3 s"
    assert "RAY_worker_niceness" in fixes[0]
    assert any(note.startswith("waiting for worker 1 of 1 to start, 2 s") for note in notes), notes


@pytest.fixture(scope="module")
def ray_grid(ray_session: RaySession[None]) -> Iterator[RayGrid]:
    with RayGrid(
        app=f"{__name__}:toy_app",
        setup=set_up,
        shared=SHARED,
        num_workers=NUM_WORKERS,
        run_config=RUN_CONFIG,
        timeout_s=TIMEOUT_S,
    ) as grid:
        yield grid


@pytest.fixture
def grid(ray_grid: RayGrid) -> RayGrid:
    ray_grid.take_events()
    return ray_grid


@pytest.fixture
def local_grid() -> Iterator[InProcessGrid]:
    with InProcessGrid(toy_app, num_nodes=NUM_WORKERS, run_config=RUN_CONFIG) as grid:
        yield grid


server_app = ServerApp()
_replies: list[tuple[int, str, RecordDict]] = []


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Two rounds; each node gets a broadcast and an array of its own."""
    for number in range(2):
        broadcast = _arrays(number)
        messages = [_with_arrays(i, broadcast, str(number)) for i in grid.get_node_ids()]
        messages += [_with_arrays(i, _arrays(100 * i + number), str(number)) for i in grid.get_node_ids()]
        order = {m.metadata.message_id: m for m in grid.send_and_receive(messages)}
        assert len(order) == len(messages)
        replies = {m.metadata.reply_to_message_id: m for m in order.values()}
        for message in messages:
            reply = replies[message.metadata.message_id]
            assert reply.metadata.src_node_id == message.metadata.dst_node_id
            _replies.append((reply.metadata.src_node_id, reply.metadata.group_id, reply.content))


def test_one_server_app_gets_the_same_replies_on_both_grids(grid: RayGrid, local_grid: InProcessGrid) -> None:
    results = []
    for one in (local_grid, grid):
        _replies.clear()
        server_app(one, Context(one.run.run_id, 1, {}, RecordDict(), dict(RUN_CONFIG)))
        results.append(list(_replies))
    assert results[0] == results[1]
    assert len(results[0]) == 4 * NUM_WORKERS
    facts = results[0][-1][2]["facts"]
    assert dict(facts) == {
        **RUN_CONFIG,
        "partition-id": 1,
        "num-partitions": NUM_WORKERS,
        "messages": 4,
        "run": 1,
    }


def test_shared_arrays_are_read_only_views_of_the_object_store(grid: RayGrid) -> None:
    replies = grid.send_and_receive([_message(node_id) for node_id in grid.get_node_ids()])
    assert len({reply.content["facts"]["pid"] for reply in replies} - {os.getpid()}) == NUM_WORKERS
    for reply in replies:
        facts = reply.content["facts"]
        assert facts["names"] == sorted(SHARED)
        assert facts["sum"] == sum(a.sum(dtype=np.float64) for a in SHARED.values())
        assert facts["in_store"]
        assert not facts["writeable"]
        assert facts["threads"] == "1"
        assert facts["niceness"] == os.nice(0)  # Ray would have them give way to everything else on the machine
        assert int(facts["keeps_memory"]) > 2**30


def _store_bytes(session: RaySession[None]) -> int:
    """Return what Ray itself says is in its object store."""
    internal = importlib.import_module("ray._private.internal_api")
    state = internal.get_state_from_address(session.ray.get_runtime_context().gcs_address)
    return int(internal.get_memory_info_reply(state).store_stats.object_store_bytes_used)


def test_a_broadcast_is_stored_once_for_all_its_messages(ray_session: RaySession[None], grid: RayGrid) -> None:
    grid.send_and_receive([_message(i, group_id="before") for i in grid.get_node_ids()])
    size = 8_000_000
    record = ArrayRecord({"v": Array(np.zeros(size, np.uint8))})
    shared_bytes = sum(array.nbytes for array in SHARED.values())
    _until(lambda: _store_bytes(ray_session) < 1.5 * shared_bytes, "the release of what earlier tests sent")
    base = _store_bytes(ray_session)
    assert grid.object_store_bytes() == shared_bytes
    messages = [_with_arrays(node_id, record, "broadcast") for node_id in grid.get_node_ids() * 3]
    for message in messages:
        message.metadata.message_type = "query.about"
    assert not any(reply.has_error() for reply in grid.send_and_receive(messages))
    assert size <= _store_bytes(ray_session) - base < 1.5 * size
    assert grid.object_store_bytes() - shared_bytes == len(record["v"].data)
    grid.send_and_receive([_message(grid.get_node_ids()[0], group_id="next")])
    assert grid.object_store_bytes() == shared_bytes
    _until(lambda: _store_bytes(ray_session) - base < size, "the old broadcast's release")


def test_a_record_changed_in_place_is_sent_as_it_is(grid: RayGrid) -> None:
    node_id = grid.get_node_ids()[0]
    record = ArrayRecord({"v": Array(np.ones(50_000, np.float32))})
    for value in (1.0, 7.0):
        record["v"] = Array(np.full(50_000, value, np.float32))
        [reply] = grid.send_and_receive([_with_arrays(node_id, record, "same")])
        assert set(reply.content["arrays"]["v"].numpy()) == {2 * value}


def test_many_messages_with_two_in_flight_at_each_node(grid: RayGrid) -> None:
    todo = [(grid.get_node_ids()[i % NUM_WORKERS], i) for i in range(300)]
    load: Counter[int] = Counter()
    pending: dict[str, int] = {}
    seen: list[int] = []
    while todo or pending:
        while todo and load[todo[-1][0]] < 2:
            node_id, value = todo.pop()
            record = ArrayRecord({"v": Array(np.array([value]))})
            pending[next(iter(grid.push_messages([_with_arrays(node_id, record)])))] = value
            load[node_id] += 1
        for reply in grid.pull_messages(list(pending)):
            value = pending.pop(reply.metadata.reply_to_message_id)
            assert reply.content["arrays"]["v"].numpy() == [2 * value]
            load[reply.metadata.src_node_id] -= 1
            seen.append(value)
    assert sorted(seen) == list(range(300))


def test_an_exception_of_the_app_is_an_error_reply_and_no_loss(grid: RayGrid, local_grid: LocalGrid) -> None:
    for one in (grid, local_grid):
        node_id = one.get_node_ids()[0]
        raised, returned = (
            one.send_and_receive([m])[0].error
            for m in (_message(node_id, "query.fail", kind="value"), _message(node_id, "query.wrong"))
        )
        assert (raised.code, raised.reason) == (flower_private.APP_ERROR, "ValueError: no such row: 7")
        assert returned.code == flower_private.APP_ERROR
        assert "returned NoneType" in str(returned.reason)
        [reply] = one.send_and_receive([_message(node_id, "train")])
        assert "KeyError" in str(reply.error.reason)
    assert grid.take_events() == []


def test_a_killed_worker_answers_what_it_held_with_errors_and_is_replaced(
    grid: RayGrid, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lost, other = grid.get_node_ids()
    [before] = grid.send_and_receive([_message(lost)])
    pid = int(before.content["facts"]["pid"])
    marker = tmp_path / "working"
    messages = [_message(lost, "query.hang", marker=str(marker)), _message(lost), _message(other)]
    ids = grid.push_messages(messages)
    _until(marker.exists, "the message in work")
    messages[0].metadata.dst_node_id = other  # the caller may change a message that it has sent
    os.kill(pid, signal.SIGKILL)
    replies: dict[str, Message] = {}
    _until(lambda: len(_pull(grid, ids, replies)) == 3, "the error replies")
    for message_id in ids[:2]:
        reply = replies[message_id]
        assert reply.error.code == flower_private.WORKER_LOST
        assert str(reply.error.reason).startswith("worker lost: ActorDiedError")
        assert "\n" not in str(reply.error.reason)
        assert reply.metadata.src_node_id == lost
    assert not replies[ids[2]].has_error()
    [after] = grid.send_and_receive([_message(lost)])
    assert after.content["facts"]["pid"] != pid
    assert after.content["facts"]["in_store"]
    events = grid.take_events()
    assert [(e["event"], e["node_id"]) for e in events] == [("worker_lost", lost), ("worker_restarted", lost)]
    assert events[0]["messages"] == 2
    assert capfd.readouterr().out == ""


def _pull(grid: RayGrid, ids: list[str], into: dict[str, Message]) -> dict[str, Message]:
    into.update({reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages(ids)})
    return into


def test_a_silent_worker_is_lost_even_when_it_is_stopped(grid: RayGrid) -> None:
    node_id = grid.get_node_ids()[0]
    [about] = grid.send_and_receive([_message(node_id)])
    pid = int(about.content["facts"]["pid"])
    processes = {pid: _descendants(os.getpid())[pid]}
    os.kill(pid, signal.SIGSTOP)
    [reply] = grid.send_and_receive([_message(node_id)], timeout=60)
    assert (reply.error.code, reply.error.reason) == (
        flower_private.WORKER_LOST,
        f"worker lost: silent for {TIMEOUT_S:g} s",
    )
    [reply] = grid.send_and_receive([_message(node_id)], timeout=60)
    assert reply.content["facts"]["pid"] != pid
    assert not _alive(processes)


def test_a_message_for_no_node_is_refused(grid: RayGrid, local_grid: LocalGrid) -> None:
    for one in (grid, local_grid):
        with pytest.raises(WorkerError, match=r"node 99.*get_node_ids"):
            one.push_messages([_message(99)])
        assert one.pull_messages(["unknown"]) == []


def test_close_ends_what_was_started_and_nothing_else(ray_session: RaySession[None], grid: RayGrid) -> None:
    """Runs after all tests that need Ray: it closes the grid of this file, and then Ray."""
    replies = grid.send_and_receive([_message(node_id) for node_id in grid.get_node_ids()])
    processes = _descendants(os.getpid())
    workers = {pid: processes[pid] for pid in (int(r.content["facts"]["pid"]) for r in replies)}
    grid.close()
    grid.close()
    with pytest.raises(WorkerError, match="closed"):
        grid.get_node_ids()
    _until(lambda: not _alive(workers), "the end of the workers")
    assert ray_session.ray.is_initialized()
    ray_session.close()
    assert _alive(processes) == []


@pytest.mark.parametrize("reference", ["toy_app", "no.such.module:app", f"{__name__}:nothing", f"{__name__}:train"])
def test_app_references_are_checked(reference: str) -> None:
    with pytest.raises(ConfigError, match="client app"):
        load_client_app(reference)


def test_more_workers_than_cores_are_refused_before_anything_starts() -> None:
    cores = available_cores()
    with pytest.raises(ConfigError, match=f"there are {cores} processor cores"):
        RayGrid(num_workers=cores + 1, run_config={})
    with pytest.raises(ConfigError, match="timeout_s = 0"):
        RayGrid(num_workers=1, run_config={}, timeout_s=0)
    with pytest.raises(ConfigError, match="num_nodes = 0"):
        InProcessGrid(toy_app, num_nodes=0, run_config={})


def test_in_process_nodes_work_one_message_a_pull_in_the_order_of_pushing(local_grid: InProcessGrid) -> None:
    record = _arrays(1)
    first, second = local_grid.get_node_ids()
    ids = local_grid.push_messages([_with_arrays(i, record) for i in (first, second, first)])
    order = []
    while replies := local_grid.pull_messages(reversed(ids)):
        assert len(replies) == 1
        order.append((replies[0].metadata.reply_to_message_id, replies[0].content["facts"]["messages"]))
    assert order == [(ids[0], 1), (ids[1], 1), (ids[2], 2)]  # each node has a state of its own
    assert list(record) == list(_arrays(1))  # the app spoils what it receives, not what the server holds


def test_ctrl_c_passes_through_an_app_in_this_process(local_grid: InProcessGrid) -> None:
    with pytest.raises(KeyboardInterrupt):
        local_grid.send_and_receive([_message(2, "query.fail", kind="interrupt")])


def test_send_and_receive_returns_what_has_arrived_at_the_timeout(local_grid: InProcessGrid) -> None:
    assert local_grid.send_and_receive([_message(2)], timeout=0.0) == []
