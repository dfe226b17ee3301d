"""Epsilon from the scores of canaries, taken as Gaussian (Andrew et al. 2024, 2302.03098, with a fixed variance).

The score of a stranger is N(0, 1), exactly so in many dimensions: a random direction against a vector that does not
know it. The score of canary j is modelled as N(a s_j, 1): s_j, the strength, says what it put into the releases, and
`a` is the same for all, for example 1 / z. Then

    a = sum s_j x_j / sum s_j^2 +- quantile / sqrt(sum s_j^2),    mu = a max s_j,    epsilon = eps_Gauss(mu, delta)

where eps_Gauss is the exact curve of two unit Gaussians at distance mu (Balle and Wang 2018).

Exact: the law of strangers' scores, the curve. Approximate: the canaries' scores are Gaussian and as good as
independent (their number is small against that of coordinates); their variance is that of strangers. Scores that vary
more, because sampling is hidden, belong to a mixture that is *more* distinguishable than the Gaussian at its mean, so
the estimate errs downward. The paper estimates the variance from the canaries instead, whose error at small epsilon is
larger than epsilon itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
import numpy.typing as npt

from fedlm.privacy.accounting import subsampled_gaussian

INTERVAL = 0.95
"""Two-sided confidence of `low` to `high`."""
CERTAINTY = 0.999
"""One-sided confidence of `at_least`, on which the alarm rests: a correct run raises one in a thousand times."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GaussianBound:
    """An empirical epsilon.

    Arguments:
        num_canaries: Members whose scores were used.
        mu: Estimated distance of member and stranger in standard deviations; mu_low, mu_high: its 95 % interval.
        epsilon, low, high: What these are at delta.
        at_least: Lower bound of epsilon with confidence 99.9 %.
        delta: Of all these epsilons.
    """

    num_canaries: int
    mu: float
    mu_low: float
    mu_high: float
    epsilon: float
    low: float
    high: float
    at_least: float
    delta: float


def gaussian_bound(scores: Floats, strengths: Floats, *, delta: float) -> GaussianBound:
    """Return the epsilon that the scores of members show.

    Arguments:
        scores: (m,) x_j of members; a stranger's would have mean zero and variance one.
        strengths: (m,) s_j >= 0 in any unit.
        delta: Of the epsilons.

    Guarantee:
        Under the model above the interval covers the epsilon of a user of the largest strength in 95 % of runs, and its
        lower end alone lies below it in 97.5 %. A spread of scores beyond one widens the interval.

    Edge cases:
        Nobody with a strength above zero: an estimate of zero, between zero and infinity.
    """
    from scipy.special import ndtri

    information = float(strengths @ strengths)
    if information == 0.0:
        return GaussianBound(0, 0.0, 0.0, inf, 0.0, 0.0, inf, 0.0, delta)
    slope, largest = float(strengths @ scores) / information, float(strengths.max())
    took_part = strengths > 0
    residuals = scores[took_part] - slope * strengths[took_part]  # (m',)
    error = max(1.0, sqrt(float(np.mean(residuals**2)))) / sqrt(information)
    width, far = error * float(ndtri((1 + INTERVAL) / 2)), error * float(ndtri(CERTAINTY))
    mu, low, high, least = (largest * value for value in (slope, slope - width, slope + width, slope - far))
    epsilon, *bounds = (epsilon_of_distance(value, delta) for value in (mu, low, high, least))
    return GaussianBound(int(took_part.sum()), mu, low, high, epsilon, bounds[0], bounds[1], bounds[2], delta)


def epsilon_of_distance(mu: float, delta: float) -> float:
    """Return epsilon at `delta` of telling N(0, 1) from N(mu, 1); zero for mu <= 0."""
    if mu <= 1e-6:
        return 0.0
    return subsampled_gaussian.epsilon(sampling_probability=1.0, noise_multiplier=1 / mu, rounds=1, delta=delta)
