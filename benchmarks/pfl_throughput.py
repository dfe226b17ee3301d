"""Devices per second of processor time and memory: pfl 0.6 against fedlm on the same model, weights and batches.

Every row is a fresh process with one thread; rows run in turn, repetition after repetition. Before anything is timed,
both sides train one batch from the same weights, and loss and gradient must agree to 1e-4.

    python -m benchmarks.pfl_throughput ubuntu_irc.users.jsonl.xz
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.matmul_rate import COMPUTE
from benchmarks.measure import machine
from benchmarks.pfl_cells import BATCH, CELLS, LENGTH, SENTENCES
from benchmarks.pfl_environment import pfl_python
from benchmarks.pfl_prepare import prepare
from simulations.grids.ray_session import WORKER_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4
KEEP_MEMORY = {name: value for name, value in WORKER_ENVIRONMENT.items() if name.startswith("MALLOC_")}
PFL_ROUTES = ("fp32", "onednn", "bf16")
DROPOUT = 0.1
NOTES = f"""\
pfl stock: as installed, glibc's allocator, after a first cohort that warms the heap. pfl tuned: its allocator keeps
memory, and products take the fastest of fp32, oneDNN ("medium") and bf16 (amp_dtype), as measured here.
What differs: fedlm clips into exact 64-bit integer sums and draws dropout masks from a seeded generator, pfl clips in
fp32 with torch's own dropout; fedlm never forms the logits of a whole batch. fedlm's workers always keep their memory.
Left out on both sides: the round's noise and server step. Alike: weights, batches in order, SGD, arithmetic of the
model (pfl's side is written out in plain PyTorch, the attention as products), {SENTENCES} full sequences of {LENGTH}
tokens a user in batches of {BATCH}, no padding. Peak: resident memory of the process; libs: before the model."""


@dataclass(frozen=True)
class Row:
    """One way to train the cell.

    Arguments:
        side: "pfl" or "fedlm".
        dropout: Rate.
        route: How products are computed, a name that the side knows.
        keeps_memory: The allocator gives nothing back.
        cheap: NCE, embedding rows and LoRA in place of full training.
    """

    side: str
    dropout: float = DROPOUT
    route: str = "fp32"
    keeps_memory: bool = True
    cheap: bool = False


def main() -> None:
    """Measure every cell in interleaved repetitions and print medians and ratios."""
    arguments = _parser().parse_args()
    python = {"pfl": arguments.pfl_python or pfl_python(), "fedlm": Path(sys.executable)}
    result: dict[str, Any] = {"machine": machine(), "devices": arguments.devices, "cells": {}}
    for name in arguments.cells:
        with tempfile.TemporaryDirectory() as folder:
            result["cells"][name] = measure_cell(name, Path(folder), python, arguments)
        if not arguments.json:
            print(_table(name, result["cells"][name]), flush=True)
    print(json.dumps(result, indent=2) if arguments.json else f"{NOTES}\n{result['machine']}")


def measure_cell(name: str, folder: Path, python: dict[str, Path], arguments: argparse.Namespace) -> dict[str, Any]:
    """Prepare, check and measure one cell."""
    sizes = prepare(name, folder, arguments.corpus, arguments.devices + 2)
    run = _Runner(name, folder, python)
    agreement = check(run, folder)
    tuned = fastest_route(run, arguments.devices)
    rows = cell_rows(name, tuned)
    found: dict[str, list[dict[str, float]]] = {label: [] for label in rows}
    for repeat in range(arguments.repeats):
        for label, row in rows.items():
            print(f"{name}, repetition {repeat + 1}: {label}", file=sys.stderr)
            found[label].append(run(row, "--devices", str(arguments.devices)))
    medians = {
        label: asdict(rows[label]) | {field: median(run[field] for run in runs) for field in runs[0]}
        for label, runs in found.items()
    }
    return {**sizes, "agreement": agreement, "tuned_route": tuned, "rows": medians}


def cell_rows(name: str, tuned: str) -> dict[str, Row]:
    """Return what is measured, by label; pfl's tuned route comes from a measurement."""
    pfl, ours = Row("pfl", route=tuned), Row("fedlm")
    rows = {"pfl stock": Row("pfl", keeps_memory=False), "pfl tuned": pfl, "fedlm": ours}
    rows |= {"pfl tuned, no dropout": replace(pfl, dropout=0.0), "fedlm, no dropout": replace(ours, dropout=0.0)}
    bf16 = replace(ours, route="bf16")
    if tuned != "bf16":
        rows["pfl bf16"] = replace(pfl, route="bf16")
    if "bf16" in COMPUTE:
        rows |= {"fedlm bf16": bf16, "fedlm bf16, no dropout": replace(bf16, dropout=0.0)}
    if CELLS[name].vocabulary == 100_000 and CELLS[name].d_model == 256:
        rows["fedlm, NCE + rows + LoRA"] = replace(ours, dropout=0.0, cheap=True)
    return rows


def fastest_route(run: _Runner, devices: int) -> str:
    """Return the route on which pfl trains most devices per second, each measured once on a few devices."""
    some = str(max(2, devices // 4))
    rates = {route: run(Row("pfl", route=route), "--devices", some)["devices_per_cpu_s"] for route in PFL_ROUTES}
    return max(rates, key=lambda route: rates[route])


def check(run: _Runner, folder: Path) -> dict[str, float]:
    """Let both sides train one batch and return the relative differences of loss and gradient.

    Raises:
        SystemExit: They compute different things.
    """
    losses, gradients = [], []
    for side in ("pfl", "fedlm"):
        file = folder / f"{side}.npz"
        losses.append(run(Row(side, dropout=0.0), "--check", str(file))["loss"])
        with np.load(file) as arrays:
            gradients.append({name: arrays[name] for name in arrays.files})
    difference = {
        "loss": abs(losses[0] - losses[1]) / losses[1],
        "gradient": relative_difference(gradients[0], gradients[1]),
    }
    if max(difference.values()) > TOLERANCE:
        raise SystemExit(f"pfl and fedlm differ by {difference} on one batch; they do not train the same model")
    return difference


def relative_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Return |a - b| / |b| over all blocks together; infinite if the blocks are not the same."""
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        return float("inf")
    squares = [(float(((a[name] - b[name]) ** 2).sum()), float((b[name] ** 2).sum())) for name in a]
    return float((sum(d for d, _ in squares) / sum(n for _, n in squares)) ** 0.5)


class _Runner:
    """Runs a row of one cell in a process of its own side's interpreter."""

    def __init__(self, cell: str, folder: Path, python: dict[str, Path]) -> None:
        self._cell, self._folder, self._python = cell, folder, python

    def __call__(self, row: Row, *options: str) -> dict[str, float]:
        module = {"pfl": "benchmarks.pfl_peer", "fedlm": "benchmarks.pfl_ours"}[row.side]
        command = [str(self._python[row.side]), "-W", "ignore", "-m", module, "--folder", str(self._folder),
                   "--cell", self._cell, "--dropout", str(row.dropout), "--route", row.route]  # fmt: skip
        if row.cheap:
            command.append("--cheap")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | (KEEP_MEMORY if row.keeps_memory else {})
        done = subprocess.run(
            [*command, *options], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        found: dict[str, float] = json.loads(done.stdout)
        return found


def _table(name: str, cell: dict[str, Any]) -> str:
    agreement = cell["agreement"]
    rows = cell["rows"]
    stock, tuned = (rows[label]["devices_per_cpu_s"] for label in ("pfl stock", "pfl tuned"))
    lines = [
        f"{name}: {CELLS[name].what}; {cell['parameters']:,} parameters, {cell['trained']:,} trained",
        f"one batch, both sides: loss within {agreement['loss']:.0e}, gradient within {agreement['gradient']:.0e}; "
        f"pfl tuned computes in {cell['tuned_route']}",
        f"{'':28}{'devices/CPU s':>14}{'to stock':>10}{'to tuned':>10}{'peak':>10}{'libs':>9}",
    ]
    for label, found in rows.items():
        rate = found["devices_per_cpu_s"]
        lines.append(
            f"{label:28}{rate:14.2f}{rate / stock:10.2f}{rate / tuned:10.2f}"
            f"{found['peak_mb']:7,.0f} MB{found['baseline_mb']:6.0f} MB"
        )
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="a users.jsonl[.xz] file, or synthetic")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--devices", type=int, default=16, help="timed in each process")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes for each row")
    parser.add_argument("--pfl-python", type=Path, help="an interpreter with pfl 0.6; default: one in the cache folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    main()
