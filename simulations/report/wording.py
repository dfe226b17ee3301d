"""Mechanisms, samplers and what a run spent, in words that need no glossary."""

from __future__ import annotations

from fedlm.rounding import stamped
from simulations.report.figures import bound, figure
from simulations.summary import RunSummary

_MECHANISMS = {
    "gaussian": "Gaussian noise, independent in every round",
    "blt": "noise correlated over the rounds (buffered linear Toeplitz)",
    "banded": "noise correlated over the rounds (banded square root)",
    "tree": "noise correlated over the rounds (tree aggregation)",
    "local": "noise that every device adds itself (local privacy)",
    "skellam": "Skellam noise, of which each device adds its part",
}
_SAMPLERS = {
    "poisson": "every device flips its own coin",
    "truncated_poisson": "every device flips its own coin, cohorts are cut at a cap",
    "fixed": "cohorts of a fixed size",
    "cyclic_poisson": "classes of devices take turns, in its turn every device flips its own coin",
    "separated": "a device rests for a least number of rounds",
}


def mechanism_in_words(name: str) -> str:
    """Return what a mechanism does; a name that is not built in stays as it is."""
    return _MECHANISMS.get(name, name)


def sampler_in_words(name: str) -> str:
    """Return who is in a cohort; a name that is not built in stays as it is."""
    return _SAMPLERS.get(name, name)


def spent_in_words(summary: RunSummary) -> str:
    """Return the stamped epsilon of the rounds done, planned and realised side by side where a ledger has a say."""
    if summary.epsilon is None:
        return stamped("no finite epsilon", summary.stamps)
    at = f"at delta {figure(summary.delta, 2)}"
    spent = f"epsilon {bound(summary.epsilon, 3)} {at}"
    if summary.shows_realised:
        spent = f"epsilon {bound(summary.epsilon, 3)} planned, {bound(summary.epsilon_realised, 3)} realised, {at}"
    return stamped(spent, summary.stamps)
