"""Mechanisms, samplers and what a run spent, in words that need no glossary."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from fedlm.errors import ConfigError
from fedlm.registry import COHORT_SAMPLERS, MECHANISMS, Registry
from fedlm.rounding import stamped
from simulations.report.figures import bound, figure
from simulations.summary import RunSummary


def mechanism_in_words(name: str) -> str:
    """Return what a mechanism does; a name that is not known here stays as it is."""
    return _words(MECHANISMS, name)


def sampler_in_words(name: str) -> str:
    """Return who is in a cohort; a name that is not known here stays as it is."""
    return _words(COHORT_SAMPLERS, name)


def _words(registry: Registry[Any], name: str) -> str:
    """Return the summary of a class; a report must not fail for a plug-in that is gone."""
    with suppress(ConfigError):
        return registry.resolve(name).summary or name
    return name


def spent_in_words(summary: RunSummary) -> str:
    """Return the stamped epsilon of the rounds done, planned and realised side by side where a ledger has a say."""
    if summary.epsilon is None:
        return stamped("no finite epsilon", summary.stamps)
    at = f"at delta {figure(summary.delta, 2)}"
    spent = f"epsilon {bound(summary.epsilon, 3)} {at}"
    if summary.shows_realised:
        spent = f"epsilon {bound(summary.epsilon, 3)} planned, {bound(summary.epsilon_realised, 3)} realised, {at}"
    return stamped(spent, summary.stamps)
