"""What the noise of a round costs: processor time and memory by mechanism, one thread.

Every mechanism adds its noise to a sum of P coordinates, round after round, as a run does. Times are processor time, so
that a busy machine distorts them little; the round that is shown is the median. Memory is what the noise keeps between
rounds, as it says itself and as the process grew beyond the sum (MB are 1e6 bytes).

    python -m benchmarks.noise_speed
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from statistics import median
from typing import Any

import numpy as np

from benchmarks.measure import machine, reset_peak, status_mb
from fedlm.privacy.mechanisms import Mechanism, Participation, create
from fedlm.privacy.mechanisms.streaming import StreamedNoise
from fedlm.privacy.noise.lattice import NoiseStream, reproducible_key

ROUNDS, SEPARATION = 2_000, 400
STD = 2.0**40
TARGETS_S = {"gaussian": 0.5, "blt, 3 buffers": 1.0}


def mechanisms() -> dict[str, Mechanism]:
    """Return what is compared; the population lets every user come once in `SEPARATION` rounds."""
    rule = Participation("separated", SEPARATION, 1, ROUNDS, separation=SEPARATION)
    found = {"gaussian": create("gaussian", rule, delta=1e-6)}
    for buffers in (1, 2, 3, 4):
        found[f"blt, {buffers} buffers"] = create("blt", rule, delta=1e-6, buffers=buffers)
    found["banded, 8 bands"] = create("banded", rule, delta=1e-6, bands=8)
    return found | {"tree": create("tree", rule, delta=1e-6)}


def measure(mechanism: Mechanism, size: int, rounds: int) -> dict[str, float]:
    """Return seconds of a round and memory of `rounds` rounds over `size` coordinates."""
    total = np.zeros(size, np.int64)
    total += 1  # every page is in memory before the noise is
    gc.collect()
    reset_peak()
    before = status_mb("VmRSS")
    noise = mechanism.new_noise(size)
    seconds = []
    for number in range(1, rounds + 1):
        stream = NoiseStream(reproducible_key(0, number))
        started = time.process_time()
        noise.add_to(total, STD, stream)
        seconds.append(time.process_time() - started)
    kept = noise.num_bytes / 1e6 if isinstance(noise, StreamedNoise) else 0.0
    # The first rounds touch the buffers for the first time.
    return {"round_s": median(seconds[1:]), "kept_mb": kept, "grown_mb": status_mb("VmHWM") - before}


def main() -> None:
    """Measure one mechanism after the other in this process."""
    arguments = _parser().parse_args()
    cases = {name: measure(kind, arguments.size, arguments.rounds) for name, kind in mechanisms().items()}
    result: dict[str, Any] = {"machine": machine(), "size": arguments.size, "rounds": arguments.rounds, "cases": cases}
    print(json.dumps(result, indent=2) if arguments.json else _table(result))


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"Noise of a round, P = {result['size']:,}, median of {result['rounds'] - 1} rounds, one thread",
        f"{'':18}{'s':>8}{'target s':>10}{'keeps MB':>10}{'grew MB':>10}",
    ]
    for name, case in result["cases"].items():
        target = f"{TARGETS_S[name]:10.1f}" if name in TARGETS_S else " " * 10
        lines.append(f"{name:18}{case['round_s']:8.3f}{target}{case['kept_mb']:10.0f}{case['grown_mb']:10.0f}")
    return "\n".join([*lines, result["machine"]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10_000_000, help="coordinates of the sum")
    parser.add_argument("--rounds", type=int, default=9, help="at least 2")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    main()
