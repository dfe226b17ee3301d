"""Tests of hypotheses with exact or bounded false-alarm probabilities.

Each function returns a p-value, at most which a correct subject falls below it. The checks alarm below `ALPHA`; all of
them together make fewer than 4,000 such tests, so the whole kit alarms falsely with probability below 1e-6.
"""

from __future__ import annotations

import math

import numpy as np

from fedlm.testkit.subject import Floats

ALPHA = 1e-10


def kolmogorov_smirnov(probabilities: Floats) -> float:
    """Return a bound on the p-value that values are iid uniform: 2 exp(-2 n D^2).

    Arguments:
        probabilities: (n,) the stated distribution function at each draw.

    Source: Massart 1990, "The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality"; holds for every n.
    """
    ordered, n = np.sort(probabilities), len(probabilities)
    places = np.arange(n + 1) / n
    distance = max(float(np.max(places[1:] - ordered)), float(np.max(ordered - places[:-1])))
    return min(1.0, 2 * math.exp(-2 * n * distance**2))


def normal_probabilities(draws: Floats) -> Floats:
    """Return the standard normal distribution function at each draw."""
    from scipy.special import ndtr

    result: Floats = ndtr(draws)
    return result


def squared_norm_probabilities(squares: Floats, freedom: int) -> Floats:
    """Return the distribution function of chi square with `freedom` degrees at each of `squares`."""
    from scipy.special import chdtr

    result: Floats = chdtr(freedom, squares)
    return result


def variance(draws: Floats) -> float:
    """Return the two-sided p-value of the sum of squares of iid N(0, 1)."""
    from scipy.special import chdtr, chdtrc

    total = float(np.sum(draws * draws))
    return min(1.0, 2 * min(float(chdtr(draws.size, total)), float(chdtrc(draws.size, total))))


def mean(draws: Floats) -> float:
    """Return the two-sided p-value of the sum of iid N(0, 1)."""
    return two_sided(float(np.sum(draws)) / math.sqrt(draws.size))


def tail(draws: Floats, beyond: float) -> float:
    """Return the two-sided p-value of how many of iid N(0, 1) lie beyond `beyond` in size."""
    return binomial(int(np.sum(np.abs(draws) > beyond)), draws.size, math.erfc(beyond / math.sqrt(2)))


def binomial(count: int, trials: int, probability: float) -> float:
    """Return the two-sided p-value of a binomial count."""
    from scipy.special import bdtr, bdtrc

    above = 1.0 if count == 0 else float(bdtrc(count - 1, trials, probability))
    return min(1.0, 2 * min(float(bdtr(count, trials, probability)), above))


def two_sided(deviations: float) -> float:
    """Return the probability that N(0, 1) lies at least so far from zero."""
    return math.erfc(abs(deviations) / math.sqrt(2))


def correlation(left: Floats, right: Floats) -> float:
    """Return the p-value, over all shifts forward and mirrored, that two vectors of iid N(0, 1) are independent.

    Exact but for a union bound: given `left`, each product with a shifted `right` is normal.
    """
    length, scale = len(left) + len(right), float(np.linalg.norm(left))
    if not scale:
        return 0.0
    spectrum, other = np.fft.rfft(left, length), np.fft.rfft(right, length)
    forward, mirrored = np.fft.irfft(spectrum * np.conj(other), length), np.fft.irfft(spectrum * other, length)
    largest = max(float(np.abs(forward).max()), float(np.abs(mirrored).max()))
    return min(1.0, 2 * length * two_sided(largest / scale))


def autocorrelation(draws: Floats) -> float:
    """Return a bound on the p-value, over all shifts, that a vector of iid N(0, 1) is independent of itself shifted.

    The products at shift k fall into two sets, by the parity of floor(i / k), in each of which one factor's coordinates
    are never the other's: given these, each set's sum is normal. Both together exceed t only if one exceeds t / 2.
    """
    length, scale = 2 * len(draws), float(np.linalg.norm(draws))
    if not scale:
        return 0.0
    spectrum = np.fft.rfft(draws, length)
    products = np.abs(np.fft.irfft(np.abs(spectrum) ** 2, length)[1 : len(draws)])
    return min(1.0, length * two_sided(float(products.max()) / (2 * scale)))


def lattice(draws: Floats) -> float:
    """Return the spacing of the lattice that N(0, 1) was rounded to, in standard deviations, by its ties.

    Two independent draws fall into one cell of width h with probability h / (2 sqrt(pi)).
    """
    _, counts = np.unique(draws, return_counts=True)
    ties = float(np.sum(counts * (counts - 1.0))) / 2
    return ties * 2 * math.sqrt(math.pi) / (draws.size * (draws.size - 1) / 2)


def single_precision(draws: Floats) -> float:
    """Return the share of draws that are fp32 numbers up to a relative 2^-45, what scaling in fp64 leaves of them."""
    rounded = draws.astype(np.float32).astype(np.float64)
    return float(np.mean(np.abs(draws - rounded) <= 2.0**-45 * np.abs(draws)))


def clopper_pearson(count: int, trials: int, alpha: float) -> tuple[float, float]:
    """Return the exact interval of a probability; each side fails with probability at most alpha / 2."""
    from scipy.special import betainccinv, betaincinv

    low = 0.0 if count == 0 else float(betaincinv(count, trials - count + 1, alpha / 2))
    high = 1.0 if count == trials else float(betainccinv(count + 1, trials - count, alpha / 2))
    return low, high


def trade_off(false_positive_rate: float, mu: float) -> float:
    """Return the largest true positive rate against a mu-Gaussian mechanism: Phi(Phi^-1(alpha) + mu).

    Source: Dong, Roth and Su 2022, "Gaussian differential privacy", equation 6.
    """
    from scipy.special import ndtr, ndtri

    return float(ndtr(ndtri(false_positive_rate) + mu))
