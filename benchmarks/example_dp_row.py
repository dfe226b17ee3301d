"""One row of the example-level DP comparison, in a process that does nothing else.

A row of fastDP runs in fastDP's environment, where fedlm is not.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.example_dp_models import CLIP_NORM, MODELS, Inputs, Sizes, batch, build, joint_norm
from benchmarks.example_dp_peers import SIDES, Side
from benchmarks.measure import reset_peak, status_mb

MIB_PER_MB = 1e6 / 2**20
ENOUGH_S = 4.0  # of timed steps
WARM_UP = 128  # tokens


def new_side(name: str, kind: str, scope: str, sizes: Sizes, length: int) -> Side:
    """Return a side around a new model.

    Arguments:
        name: A key of SIDES, "ours" or "plain, our head".
        kind: The model.
        scope: What trains.
        sizes: The model's sizes.
        length: T.
    """
    made: Any = SIDES.get(name)
    if made is None:
        from benchmarks.example_dp_ours import side

        made = side(name, kind)
    new: Side = made(build(kind, sizes, length), kind, scope)
    return new


def measure(name: str, kind: str, scope: str, length: int, steps: int) -> dict[str, float]:
    """Return processor seconds of a step and the peak memory of the first one above the model's, in MiB.

    Another model takes a short step before: first calls load and compile code, and products keep their buffers.
    """
    sizes, inputs = MODELS[kind], batch(kind, MODELS[kind], length)
    side = new_side(name, kind, scope, sizes, length)
    side.step(batch(kind, sizes, min(length, WARM_UP)))
    del side
    gc.collect()
    side = new_side(name, kind, scope, sizes, length)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    reset_peak()
    baseline_mb = status_mb("VmRSS")
    seconds = [_seconds(side, inputs)]
    peak_mb = status_mb("VmHWM") - baseline_mb
    while len(seconds) < steps and sum(seconds) < ENOUGH_S:
        seconds.append(_seconds(side, inputs))
    return {"step_s": median(seconds), "peak_mib": peak_mb * MIB_PER_MB, "baseline_mib": baseline_mb * MIB_PER_MB}


def _seconds(side: Side, inputs: Inputs) -> float:
    started = time.process_time()
    side.step(inputs)
    return time.process_time() - started


def check(name: str, kind: str, scope: str, length: int, out: Path) -> dict[str, float]:
    """Store the clipped sum of one batch and return the norm of a single example's, in units of the clip norm."""
    side, inputs = new_side(name, kind, scope, MODELS[kind], length), batch(kind, MODELS[kind], length)
    sums = side.stock_names(side.step(inputs))
    np.savez(out, **{name: value.numpy() for name, value in sums.items()})  # type: ignore[arg-type]
    return {"single_norm": joint_norm(side.step(inputs.select(slice(0, 1)))) / CLIP_NORM}


def main() -> None:
    """Measure or check one row, and print one JSON object; a refusal is a result as well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", required=True)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--scope", required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--check", type=Path, help="store the clipped sum of one batch here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    row = (arguments.side, arguments.model, arguments.scope, arguments.length)
    try:
        found: dict[str, Any] = check(*row, arguments.check) if arguments.check else measure(*row, arguments.steps)
    except NotImplementedError as refusal:
        found = {"refused": str(refusal)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
