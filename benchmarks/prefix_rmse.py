"""How much noise correlated mechanisms leave in prefix sums, that is in the model after each round.

First table: the RMSE, over all rounds, of the noise in one coordinate of the sum of all releases so far, for clip
norm 1 and the noise multiplier that each mechanism needs at an epsilon; at the scale of the StackOverflow data (342,477
users, 1,000 a round, 2,052 rounds, delta 1e-6). Banded noise has the best of a few numbers of bands (in parentheses).
Second table: RMSE times sensitivity, to which the RMSE is proportional at every epsilon without amplification, for
2,000 rounds and users who come five times, 400 rounds apart. Beside each figure stands what it should be, within 5 %.

    python -m benchmarks.prefix_rmse
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.measure import machine
from fedlm.privacy.accounting.subsampled_gaussian import gaussian_mu
from fedlm.privacy.mechanisms import Participation, create, toeplitz
from fedlm.privacy.mechanisms.banded import Banded
from fedlm.privacy.mechanisms.base import Floats

POPULATION, COHORT, ROUNDS, DELTA = 342_477, 1_000, 2_052, 1e-6
EXPECTED = {1: (29.3, 38.8, 24.8), 2: (24.0, 20.5, 15.3), 4: (19.7, 11.0, 9.6), 8: (16.1, 6.00, 5.86)}
EXPECTED_BANDS = {1: 8, 2: 16, 4: 64, 8: 342}
EXPECTED_PRODUCTS = {
    "independent": 70.7, "tree": 13.68, "square root": 9.42, "blt, 1 buffer": 8.83, "blt, 2 buffers": 8.16,
    "blt, 3 buffers": 8.15, "banded square root": 7.95, "banded, optimised": 7.85,
}  # fmt: skip


def at_scale(epsilon: float) -> dict[str, tuple[float, int]]:
    """Return RMSE and bands (0: none) of Poisson DP-FedAvg, BLT with two buffers and amplified banded noise."""
    separation = POPULATION // COHORT
    found = {}
    for name, sampler in (("gaussian", "poisson"), ("blt", "separated"), ("banded", "cyclic_poisson")):
        apart = separation if sampler == "separated" else 1
        rule = Participation(sampler, POPULATION, COHORT, ROUNDS, separation=apart)
        made = create(name, rule, delta=DELTA, epsilon=epsilon)
        noise = made.noise_multiplier(epsilon=epsilon, delta=DELTA) * made.prefix_rmse()
        found[name] = (noise, made.bands if isinstance(made, Banded) else 0)
    return found


def products(rounds: int = 2_000, separation: int = 400) -> Iterator[tuple[str, float]]:
    """Yield RMSE times sensitivity of each matrix for users who come as often as the separation lets them."""
    rule = Participation("separated", separation, 1, rounds, separation=separation)
    cases = [
        ("independent", "gaussian", {}), ("tree", "tree", {}), ("blt, 1 buffer", "blt", {"buffers": 1}),
        ("blt, 2 buffers", "blt", {"buffers": 2}), ("blt, 3 buffers", "blt", {"buffers": 3}),
        ("banded square root", "banded", {"bands": separation}),
    ]  # fmt: skip
    for case, name, options in cases:
        made = create(name, rule, delta=DELTA, **options)
        # At any epsilon, here 1, noise multiplier times mu is the sensitivity.
        moved = made.noise_multiplier(epsilon=1.0, delta=DELTA) * gaussian_mu(1.0, DELTA)
        yield case, made.prefix_rmse() * moved
    column = toeplitz.square_root_column(rounds)
    times = -(-rounds // separation)
    moved = toeplitz.sensitivity(column, separation=separation, participations=times)
    yield "square root", moved * toeplitz.prefix_rmse(toeplitz.inverse_column(column, rounds))
    yield "banded, optimised", math.sqrt(times) * optimised_band(rounds, separation)


def optimised_band(rounds: int, bands: int) -> float:
    """Return the least RMSE times column norm of all Toeplitz matrices with so many bands, by descent."""
    from scipy.optimize import minimize
    from scipy.signal import fftconvolve

    left = np.arange(rounds, 0, -1.0)  # (T,) rows of A C^-1 in which its i-th coefficient stands

    def loss(rest: Floats) -> tuple[float, Floats]:
        column = np.concatenate([[1.0], rest])  # (b,)
        inverse = toeplitz.inverse_column(column, rounds)  # (T,)
        sums = np.cumsum(inverse)
        error, norm = float(sums**2 @ left), float(column @ column)
        # A change of c_j changes the sums by minus their product with C^-1, j places on.
        pulled = fftconvolve((sums * left)[::-1], fftconvolve(sums, inverse)[:rounds])[:rounds][::-1]  # (T,)
        return (math.log(error) + math.log(norm)) / 2, rest / norm - pulled[1:bands] / error

    start = toeplitz.square_root_column(bands)[1:]
    best = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return math.exp(float(best.fun)) / math.sqrt(rounds)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    scale = {epsilon: at_scale(epsilon) for epsilon in EXPECTED}
    result: dict[str, Any] = {"machine": machine(), "rmse": scale, "rmse_times_sensitivity": dict(products())}
    print(json.dumps(result, indent=2) if arguments.json else _table(result))


def _table(result: dict[str, Any]) -> str:
    lines = [f"{'epsilon':>7}{'Poisson':>10}{'':8}{'BLT, 2 buffers':>16}{'':8}{'banded, cyclic Poisson':>24}"]
    for epsilon, row in result["rmse"].items():
        poisson, blt, banded = EXPECTED[epsilon]
        bands = f"({row['banded'][1]})"
        lines.append(
            f"{epsilon:7}{row['gaussian'][0]:10.2f} {poisson:<7}{row['blt'][0]:16.2f} {blt:<7}"
            f"{row['banded'][0]:16.2f} {bands:>7} {banded} ({EXPECTED_BANDS[epsilon]})"
        )
    lines += ["", "RMSE times sensitivity, T 2,000, b 400, k 5"]
    for name, value in sorted(result["rmse_times_sensitivity"].items(), key=lambda case: -float(case[1])):
        lines.append(f"{name:24}{value:8.3f} {EXPECTED_PRODUCTS[name]}")
    return "\n".join([*lines, result["machine"]])


if __name__ == "__main__":
    main()
