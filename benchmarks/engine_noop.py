"""What the engine itself costs: devices that do nothing, on stock Flower's simulation and on `RayGrid`.

Three sides take turns, each cell in a fresh process with Ray on two processors:

* stock: `flwr.simulation.run_simulation`, a plain ServerApp that sends the model to every node and awaits all replies;
* streamed: `RayGrid`, one message a device, the model down and an update of the same size up;
* summed: `RayGrid` and the product's dispatcher; workers clip and sum the updates, exactly, and send one sum each.

A cell that takes longer than the limit is stopped: ours then show the rate so far, stock's reply comes all at once and
shows none, and stock's larger cells of the same size are left out. A guard stops a cell before memory runs out.

    python -m benchmarks.engine_noop [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from benchmarks.measure import machine, status_mb
from clients.node_sum import NodeSum
from fedlm.codec import to_text
from fedlm.flower_records import from_records, to_records
from fedlm.messages import FlushRequest, PartialSum, TrainReply, TrainRequest
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.clipping.clipped_sum import new_sum
from server.transport.dispatch import Dispatcher
from server.transport.exchange import ExchangeSpec
from simulations.grids.ray_grid import RayGrid

SIDES = ("stock", "streamed", "summed")
WORKERS, DEPTH, GROUP, CLIP_NORM = 2, 32, 8, 0.3
START_S = 40  # on top of the limit: imports, Ray, stock Flower's nodes
GUARD_MB = 2_000  # memory that must stay free
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ADDRESS": "local",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
}

echo = ClientApp()
summer = ClientApp()
_kept = NodeSum()
_updates: list[np.ndarray] = []


@echo.query("ready")
@echo.train()
def send_back(message: Message, context: Context) -> Message:
    """Return what came, as a device that trains nothing."""
    return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)


@summer.query("ready")
def make_updates(message: Message, context: Context) -> Message:
    """Make the updates that this worker's devices send."""
    shape = (GROUP, *message.content.array_records["arrays"]["model"].shape)
    _updates.append(np.random.default_rng(1).standard_normal(shape, np.float32))
    return Message(RecordDict(), reply_to=message)


@summer.train()
def add(message: Message, context: Context) -> Message:
    """Clip and add a ready-made update for every device."""
    request = from_records(TrainRequest, "request", message.content)
    [updates] = _updates
    with _kept.work_item(request, updates.shape[1]) as total:
        for num_devices in request.group_sizes.tolist():
            total.add_many(updates[:num_devices])
    nothing = np.empty(0)
    reply = TrainReply(False, request.devices, nothing, nothing, nothing.astype(np.int64), [], 0.0)
    records = to_records("reply", reply) | (to_records("sum", _kept.flush(request.sum_name)) if request.flush else {})
    return Message(RecordDict(records), reply_to=message)


@summer.train("flush")
def flush(message: Message, context: Context) -> Message:
    """Send the sum."""
    request = from_records(FlushRequest, "request", message.content)
    return Message(RecordDict(to_records("sum", _kept.flush(request.sum_name))), reply_to=message)


def main() -> None:
    """Measure every cell on every side and print the table."""
    arguments = _parser().parse_args()
    if arguments.measure:
        num_devices, mb = arguments.cell
        measure(arguments.measure, num_devices, mb, Path(arguments.out), arguments.limit)
        return
    cells = [(n, mb) for n in arguments.devices for mb in arguments.mb]
    found: dict[str, dict[str, Any]] = {}
    too_large: set[float] = set()
    result = {"machine": machine(), "limit_s": arguments.limit, "cells": found}
    for num_devices, mb in cells:
        cell = found[f"{num_devices} x {mb:g}"] = {}
        for side in SIDES:
            if side == "stock" and mb in too_large:
                cell[side] = {"stopped": "left out: fewer were too many"}
                continue
            cell[side] = in_fresh_process(side, num_devices, mb, arguments.limit)
            print(f"{num_devices} devices x {mb:g} MB, {side}: {cell[side]}", file=sys.stderr)
            if side == "stock" and "stopped" in cell[side]:
                too_large.add(mb)
    print(json.dumps(result, indent=2) if arguments.json else _table(result))


def in_fresh_process(side: str, num_devices: int, mb: float, limit_s: float) -> dict[str, Any]:
    """Run one cell; returns devices per second and the driver's peak memory, or what stopped it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.engine_noop", "--measure", side, "--out", str(out)]
        options = ["--cell", str(num_devices), str(mb), "--limit", str(limit_s)]
        log = (Path(folder) / "log").open("w+")
        process = subprocess.Popen([*command, *options], env={**os.environ, **QUIET}, stdout=log, stderr=log)
        stopped, peak_mb, deadline = "", 0.0, time.monotonic() + START_S + limit_s
        while process.poll() is None and not stopped:
            time.sleep(0.05)
            try:
                peak_mb = max(peak_mb, status_mb("VmRSS", process.pid) - status_mb("RssShmem", process.pid))
            except (ProcessLookupError, FileNotFoundError):
                continue
            if psutil.virtual_memory().available < GUARD_MB * 1e6:
                stopped = "memory guard"
            elif time.monotonic() > deadline:
                stopped = "time limit"
        if stopped:
            _end(process)
            return {"stopped": stopped, "driver_mb": peak_mb}
        if not out.exists():
            log.seek(0)
            raise SystemExit(f"{side}, {num_devices} devices x {mb:g} MB: {log.read()[-2000:]}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found | {"driver_mb": peak_mb}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a cell with all that it has started."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)


def measure(side: str, num_devices: float, mb: float, out: Path, limit_s: float) -> None:
    """Measure one cell in this process and write what was found."""
    model = np.zeros(max(1, int(mb * 250_000)), np.float32)
    record = ArrayRecord({"model": Array(model)})
    if side == "stock":
        _stock(int(num_devices), record, out)
        return
    app = {"streamed": "echo", "summed": "summer"}[side]
    with RayGrid(app=f"benchmarks.engine_noop:{app}", num_workers=WORKERS, run_config={}) as grid:
        ready = [Message(RecordDict({"arrays": record}), i, "query.ready") for i in grid.get_node_ids()]
        assert not any(reply.has_error() for reply in grid.send_and_receive(ready))
        started = time.monotonic()
        run = _streamed if side == "streamed" else _summed
        done = run(grid, int(num_devices), record, started + limit_s)
        seconds = time.monotonic() - started
    out.write_text(json.dumps({"devices": done, "seconds": seconds, "devices_per_second": done / seconds}))


def _stock(num_devices: int, record: ArrayRecord, out: Path) -> None:
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()
    def ask_all(grid: Grid, context: Context) -> None:
        while len(nodes := list(grid.get_node_ids())) < num_devices:
            time.sleep(0.1)
        warm_up = [Message(RecordDict({"arrays": record}), node, "train") for node in nodes[: 2 * WORKERS]]
        assert not any(reply.has_error() for reply in grid.send_and_receive(warm_up))  # its actors have started
        started = time.monotonic()
        messages = [Message(RecordDict({"arrays": record}), node, "train") for node in nodes]
        replies = list(grid.send_and_receive(messages))
        seconds = time.monotonic() - started
        assert len(replies) == num_devices
        assert not any(reply.has_error() for reply in replies)
        found = {"devices": num_devices, "seconds": seconds, "devices_per_second": num_devices / seconds}
        out.write_text(json.dumps(found))

    backend: Any = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0},
        "init_args": {"num_cpus": WORKERS, "num_gpus": 0, "include_dashboard": False, "log_to_driver": False},
    }
    run_simulation(server, echo, num_devices, backend_config=backend)


def _streamed(grid: RayGrid, num_devices: int, record: ArrayRecord, deadline: float) -> int:
    """Ask each device by itself, `DEPTH` messages at a time at each worker; small depths for large messages."""
    depth = DEPTH if record.count_bytes() < 2e5 else 2
    load: Counter[int] = Counter()
    pending: dict[str, int] = {}
    left, done = num_devices, 0
    while (left or pending) and time.monotonic() < deadline:
        messages = []
        for node in grid.get_node_ids():
            for _ in range(min(left, depth - load[node])):
                messages.append(Message(RecordDict({"arrays": record}), node, "train", group_id="1"))
                load[node], left = load[node] + 1, left - 1
        pending |= {i: m.metadata.dst_node_id for i, m in zip(grid.push_messages(messages), messages, strict=True)}
        for reply in grid.pull_messages(list(pending)):
            assert not reply.has_error()
            load[pending.pop(reply.metadata.reply_to_message_id)] -= 1
            done += 1
    return done


def _summed(grid: RayGrid, num_devices: int, record: ArrayRecord, deadline: float) -> int:
    """One round of the product's dispatcher."""
    clip_spec, cohort = ClipSpec(CLIP_NORM), np.arange(num_devices)
    total = new_sum(clip_spec, record["model"].shape[0])

    def take(partial: PartialSum) -> None:
        fields = {"clip_norm": CLIP_NORM, "num_devices": partial.num_devices}
        total.add_arrays(partial.total, fields)

    dispatcher = Dispatcher(grid, 600.0, lambda node, reason: None)
    groups = [cohort[i : i + GROUP] for i in range(0, num_devices, GROUP)]
    requests = dispatcher.work_items(cohort, np.full(num_devices, 100), groups, to_text(clip_spec))
    done = 0
    for _, reply in dispatcher.train(ExchangeSpec("train", "1", {"arrays": record}, dict), requests, take):
        done += len(reply.devices)
        if time.monotonic() > deadline:
            return done
    assert total.num_devices == num_devices
    return done


def _table(result: dict[str, Any]) -> str:
    """Return the figures as text; ratios are to stock Flower's rate in the same run."""
    lines = [
        "No-op devices: devices per second (peak memory of the driver, MB, without the object store's shared pages; "
        "ratio to stock Flower)",
        result["machine"],
        f"{WORKERS} workers; limit {result['limit_s']:g} s a cell beside the start; * stopped there, rate so far",
        "",
        f"{'devices x MB':>14}{'stock Flower':>32}{'streamed':>28}{'summed in workers':>28}",
    ]
    for name, cell in result["cells"].items():
        columns = (f"{_figure(name, cell, side):>{32 if side == 'stock' else 28}}" for side in SIDES)
        lines.append(f"{name:>14}{''.join(columns)}")
    return "\n".join(lines)


def _figure(name: str, cell: dict[str, Any], side: str) -> str:
    found, stock = cell[side], cell["stock"].get("devices_per_second")
    if "stopped" in found:
        return found["stopped"] if found["stopped"].startswith("left") else f"stopped by {found['stopped']}"
    star = "*" if found["devices"] < int(name.split()[0]) else ""
    ratio = f", {found['devices_per_second'] / stock:.1f}x" if stock and side != "stock" else ""
    return f"{found['devices_per_second']:,.0f}{star} ({found['driver_mb']:,.0f} MB{ratio})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--mb", type=float, nargs="+", default=[0, 1, 10, 40], help="each way, for each device")
    parser.add_argument("--limit", type=float, default=8.0, help="seconds for one cell of one side")
    parser.add_argument("--quick", action="store_const", dest="devices", const=[100], help="100 devices only")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--cell", type=float, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
