"""A lower bound of epsilon from one run, without a model of the noise (Steinke, Nasr, Jagielski 2023, 2305.08846).

m canaries are members by independent fair coins. The auditor names r of them, guesses each one's coin, abstains from
the others, and is right v times. If the run is (epsilon, delta)-private (their theorem for approximate DP),

    P[V >= v] <= beta + 2 m delta max_{i = 1..v} (P[W >= v - i] - P[W >= v]) / i
    beta = P[W >= v],    W ~ Binomial(r, e^epsilon / (1 + e^epsilon))

The smallest epsilon at which this reaches 1 - confidence is a lower bound of the true one.

Exact for any mechanism and any rule of guessing that does not know the coins. Weak beside the Gaussian bound: r right
guesses of r show no more than about ln(r / 3), whatever the noise.

The number of guesses is tried at r = m, m/2, m/4, ...; each try takes its part of the error probability, so that
choosing the best one costs nothing in validity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlm.errors import ConfigError

_FEWEST = 8
_STEP, _LARGEST = 0.25, 60.0

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class OneRunBound:
    """A lower bound of epsilon.

    Arguments:
        epsilon: Holds with `confidence`.
        confidence: One-sided.
        num_canaries: m.
        num_guesses: r of the best try.
        num_correct: v of the best try.
    """

    epsilon: float
    confidence: float
    num_canaries: int
    num_guesses: int
    num_correct: int


def one_run_bound(scores: Floats, members: Flags, *, delta: float, confidence: float) -> OneRunBound:
    """Return the lower bound that guessing by score gives: the highest are called members, the lowest strangers.

    Arguments:
        scores: (m,) of all canaries, members and strangers; higher speaks for membership.
        members: (m,) their coins.
        delta: Of the bound.
        confidence: Of the bound, one-sided.

    Raises:
        ConfigError: Scores and coins of different number, or a confidence outside (0, 1).
    """
    if scores.shape != members.shape or scores.ndim != 1:
        raise ConfigError(f"{scores.shape} scores do not fit {members.shape} coins; give one of each for a canary")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence = {confidence} must be between 0 and 1; use 0.95")
    num_canaries = len(scores)
    order = np.argsort(scores, kind="stable")  # (m,)
    tries = _tries(num_canaries)
    best = OneRunBound(0.0, confidence, num_canaries, 0, 0)
    for num_guesses in tries:
        low, high = order[: num_guesses // 2], order[num_canaries - (num_guesses - num_guesses // 2) :]
        num_correct = int(members[high].sum()) + int((~members[low]).sum())
        error = (1 - confidence) / len(tries)
        epsilon = lower_bound(num_canaries, num_guesses, num_correct, delta=delta, error=error)
        if epsilon > best.epsilon:
            best = OneRunBound(epsilon, confidence, num_canaries, num_guesses, num_correct)
    return best


def lower_bound(num_canaries: int, num_guesses: int, num_correct: int, *, delta: float, error: float) -> float:
    """Return the smallest epsilon >= 0 under which so many right guesses have probability above `error`.

    Arguments:
        num_canaries, num_guesses, num_correct: m, r, v.
        delta: Of the guarantee.
        error: One minus the confidence.
    """

    def is_plausible(epsilon: float) -> bool:
        return probability_of_guesses(num_canaries, num_guesses, num_correct, epsilon=epsilon, delta=delta) > error

    high = 0.0
    while not is_plausible(high):
        high += _STEP
        if high >= _LARGEST:
            return _LARGEST
    low = max(high - _STEP, 0.0)
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if is_plausible(middle) else (middle, high)
    return low


def probability_of_guesses(
    num_canaries: int, num_guesses: int, num_correct: int, *, epsilon: float, delta: float
) -> float:
    """Return the theorem's bound on the probability of at least so many right guesses; at most 1."""
    from scipy.special import bdtrc, expit

    right = expit(epsilon)  # probability of one right guess
    beta = float(bdtrc(num_correct - 1, num_guesses, right))  # of more than v - 1 of them
    steps = np.arange(1, num_correct + 1)  # (v,)
    gains = (bdtrc(num_correct - steps - 1, num_guesses, right) - beta) / steps
    return min(1.0, beta + 2 * num_canaries * delta * float(gains.max(initial=0.0)))


def _tries(num_canaries: int) -> list[int]:
    """Return the numbers of guesses: a function of m alone."""
    tries = [num_canaries]
    while tries[-1] // 2 >= _FEWEST:
        tries.append(tries[-1] // 2)
    return tries
