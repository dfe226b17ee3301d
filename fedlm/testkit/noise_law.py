"""Check 3: the noise is what is claimed: N(0, std^2), in all coordinates and rounds, on a fine lattice, after C.

The worlds are those whose mean is known without knowing the clip; what is left of a release is its noise.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedlm.testkit import statistics
from fedlm.testkit.failure import PrivacyTestFailure
from fedlm.testkit.statistics import ALPHA
from fedlm.testkit.subject import Floats, Make, Setting
from fedlm.testkit.worlds import SMALL_CROWDS, ask, known_mean, whitened_rounds

WIDE = Setting(
    size=8_192, fleet_size=24, cohort=8, clip_norm=0.5, noise_multiplier=1.3, rounds=8, seed=14, reproducible=False
)
NARROW = replace(WIDE, size=8, rounds=50)
_NARROW_RUNS = 8
_SEGMENTS = 8
LARGEST_CELL = 2.0**-17
"""Coarsest lattice, in standard deviations, that passes; fedlm's own is 2^-20 to 2^-21."""
LARGEST_SINGLE = 0.01
"""Largest share of draws that are fp32 numbers to 45 bits; of fp64 draws about 2^-20 are."""


def noise_law(make: Make) -> None:
    """Compare the noise with the stated law, in worlds from an empty to a full cohort.

    Arguments:
        make: Makes the runs under examination.

    Raises:
        PrivacyTestFailure: Distribution function, mean, variance (of all, of a round, of an eighth of the
            coordinates), tails beyond 2, 3 and 4 standard deviations, independence of coordinates, granularity,
            precision, or the law of short vectors' norms is not that of iid N(0, 1) after whitening.

    Guarantee:
        False alarms: below 2e-7 (fewer than 1,200 tests at 1e-10; the lattice's alarm lies far beyond them).
        Found in 20 of 20 trials each: a std wrong by 2 % in all coordinates, by 7 % in one eighth of them, by half in
        an answer of a side query; Laplace and uniform noise, truncation at 3 standard deviations, fp16, bf16, fp32
        in a release of fp64, a lattice of 2^-16; correlations of 0.25 within a round; redrawing one vector in five.
    """
    for crowd in SMALL_CROWDS:
        noise = _common(_noise(make, WIDE, crowd))  # (T, P)
        _same_law(noise, crowd)
        _same_variance(noise, crowd)
        _independent(noise, crowd)
        _fine(noise, crowd)
        _double(noise, crowd)
    _norms(make)


def _noise(make: Make, setting: Setting, crowd: str) -> list[Floats]:
    """Return the whitened noise (P',) of each round of a run."""
    subject, outcomes, means = make(setting), [], []
    for t in range(1, setting.rounds + 1):
        updates = SMALL_CROWDS[crowd](setting, subject.sample_cohort(t), t)
        outcomes.append(ask(subject, t, updates, crowd))
        means.append(known_mean(updates, setting, outcomes[-1]))
    return whitened_rounds(subject, outcomes, means)


def _common(rows: list[Floats]) -> Floats:
    """Return the coordinates that all rounds have (T, P)."""
    size = min(map(len, rows))
    return np.array([row[:size] for row in rows])


def _alarm(probability: float, what: str, crowd: str) -> None:
    if not probability >= ALPHA:
        raise PrivacyTestFailure(
            f"noise law: {what} (world: {crowd}); of the claimed noise this has probability {probability:.1g}"
        )


def _same_law(noise: Floats, crowd: str) -> None:
    draws = noise.ravel()
    std = float(np.std(draws))
    _alarm(statistics.variance(draws), f"the noise has {std:.4g} times its claimed standard deviation", crowd)
    _alarm(
        statistics.kolmogorov_smirnov(statistics.normal_probabilities(draws)),
        f"the noise is not Gaussian: largest of {draws.size:,} draws {np.abs(draws).max():.3g}, "
        f"kurtosis {np.mean(draws**4) / std**4:.3g} (Gaussian 3)",
        crowd,
    )
    for beyond in (2.0, 3.0, 4.0):
        share = float(np.mean(np.abs(draws) > beyond))
        _alarm(statistics.tail(draws, beyond), f"a share {share:.3g} of the noise is beyond {beyond:.0f} std", crowd)


def _fine(noise: Floats, crowd: str) -> None:
    if (cell := statistics.lattice(noise.ravel())) > LARGEST_CELL:
        raise PrivacyTestFailure(
            f"noise law: the noise lies on a lattice of {cell:.3g} std (world: {crowd}), allowed is "
            f"{LARGEST_CELL:.3g}; its gaps show which sums are possible: draw it in fp64"
        )


def _double(noise: Floats, crowd: str) -> None:
    """Refuse draws of single precision, unless a coarser rounding of the release hides what they were."""
    share = statistics.single_precision(noise.ravel())
    if share > LARGEST_SINGLE:
        raise PrivacyTestFailure(
            f"noise law: a share {share:.3g} of the noise, in standard deviations, are fp32 numbers (world: {crowd}), "
            f"allowed is {LARGEST_SINGLE:g}; its gaps and its short tails show which sums are possible: draw it in fp64"
        )


def _same_variance(noise: Floats, crowd: str) -> None:
    for t, row in enumerate(noise, start=1):
        _alarm(statistics.mean(row), f"the noise of round {t} has mean {row.mean():.3g} std", crowd)
        _alarm(statistics.variance(row), f"the noise of round {t} has {np.std(row):.4g} times its claimed std", crowd)
    for i, part in enumerate(np.array_split(noise, _SEGMENTS, axis=1)):
        std = float(np.sqrt(np.mean(part**2)))
        what = f"coordinates of part {i + 1} of {_SEGMENTS} have {std:.4g} times the claimed std"
        _alarm(statistics.variance(part.ravel()), what, crowd)


def _independent(noise: Floats, crowd: str) -> None:
    """Compare each round with itself shifted, and its parts with one another, shifted and mirrored."""
    for t, row in enumerate(noise, start=1):
        _alarm(statistics.autocorrelation(row), f"the noise of round {t} is correlated between coordinates", crowd)
        parts = np.array_split(row, _SEGMENTS)
        for i in range(_SEGMENTS):
            for j in range(i):
                what = f"the noise of round {t} repeats: parts {j + 1} and {i + 1} of {_SEGMENTS} are correlated"
                _alarm(statistics.correlation(parts[i], parts[j]), what, crowd)


def _norms(make: Make) -> None:
    """Compare short noise vectors with chi square: their norms, for noise chosen among draws; each coordinate."""
    for crowd in ("nobody else reports", "an ordinary cohort"):
        rows = [row for seed in range(_NARROW_RUNS) for row in _noise(make, replace(NARROW, seed=seed), crowd)]
        noise = _common(rows)  # (runs T, P)
        squares, size = np.sum(noise**2, axis=1), noise.shape[1]  # (runs T,)
        probabilities = statistics.squared_norm_probabilities(squares, size)
        what = (
            f"norms of {len(squares):,} noise vectors of {size} coordinates (mean square {squares.mean() / size:.3g})"
        )
        _alarm(statistics.kolmogorov_smirnov(probabilities), f"{what} do not follow chi square", crowd)
        for i in range(max(map(len, rows))):
            draws = np.array([row[i] for row in rows if len(row) > i])
            std = float(np.sqrt(np.mean(draws**2)))
            whose = f"coordinate {i}" if i < NARROW.size else f"answer {i - NARROW.size} of the side queries"
            _alarm(statistics.variance(draws), f"{whose} has {std:.3g} times its claimed std", crowd)
