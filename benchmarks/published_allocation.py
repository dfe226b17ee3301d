"""What noise allocated by importance under one clip really costs (ANADP as published, Li et al. 2024, 2410.02912).

The paper gives important parameters less noise and accounts for the overall noise. But a user's clipped update may lie
wholly in the coordinates with the least noise, so the least standard deviation decides. The table has the true epsilon
by the least noise of a group, as a part of the nominal noise, and by the epsilon that is claimed for the nominal noise:
Poisson-sampled Gaussian, q = 0.005, 2,000 rounds, delta 1e-6, by privacy loss distributions.

    python -m benchmarks.published_allocation
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.measure import machine
from fedlm.privacy.accounting import subsampled_gaussian

SAMPLING_PROBABILITY, ROUNDS, DELTA = 0.005, 2_000, 1e-6
RATIOS = (1.0, 0.9, 0.8, 0.7, 0.5, 0.3)
NOMINAL = (1.0, 2.0, 4.0, 8.0)


def true_epsilon(nominal: float, ratio: float) -> float:
    """Return what is spent when noise calibrated to an epsilon is reduced somewhere.

    Arguments:
        nominal: The epsilon of the noise that is accounted for.
        ratio: Least standard deviation of any coordinate, as a part of that noise.
    """
    z = subsampled_gaussian.noise_multiplier(
        sampling_probability=SAMPLING_PROBABILITY, rounds=ROUNDS, epsilon=nominal, delta=DELTA
    )
    return subsampled_gaussian.epsilon(
        sampling_probability=SAMPLING_PROBABILITY, noise_multiplier=z * ratio, rounds=ROUNDS, delta=DELTA
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rows = {ratio: {nominal: true_epsilon(nominal, ratio) for nominal in NOMINAL} for ratio in RATIOS}
    result: dict[str, Any] = {
        "machine": machine(),
        "sampling_probability": SAMPLING_PROBABILITY,
        "rounds": ROUNDS,
        "delta": DELTA,
        "epsilon": rows,
    }
    print(json.dumps(result, indent=2) if arguments.json else _table(result))


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"True epsilon, q = {SAMPLING_PROBABILITY:g}, T = {ROUNDS:,}, delta = {DELTA:g}",
        f"{'least noise / nominal':>21}" + "".join(f"{f'nominal {nominal:g}':>12}" for nominal in NOMINAL),
    ]
    for ratio, row in result["epsilon"].items():
        lines.append(f"{ratio:21.1f}" + "".join(f"{value:12.4g}" for value in row.values()))
    return "\n".join([*lines, result["machine"]])


if __name__ == "__main__":
    main()
