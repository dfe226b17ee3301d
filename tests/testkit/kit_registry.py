"""The wrong implementations by name, each with the check that must catch it; files of their own enter theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from kit_plain import Plain

from fedlm.config.schema import PrivacyConfig, RowsConfig, StrategyConfig
from fedlm.strategies import Release, ServerOptimizer, StrategyState
from fedlm.testkit import Make, StrategyRun, StrategySubject

MUTANTS: dict[str, tuple[Make, str]] = {}


class Averaging(ServerOptimizer):
    """Correct: what the mutants of strategies start from, and what those of a plan run."""

    slot_names = ("momentum",)

    def update(self, state: StrategyState, release: Release) -> tuple[Any, dict[str, float]]:
        state.slots["momentum"] += release.mean
        return state.values + state.slots["momentum"], {"norm": float(np.linalg.norm(release.mean))}


def mutant(name: str, caught_by: str) -> Callable[[type[Plain]], type[Plain]]:
    def note(kind: type[Plain]) -> type[Plain]:
        MUTANTS[name] = (kind, caught_by)
        return kind

    return note


def strategy_mutant(name: str, caught_by: str) -> Callable[[type[ServerOptimizer]], type[ServerOptimizer]]:
    def note(kind: type[ServerOptimizer]) -> type[ServerOptimizer]:
        MUTANTS[name] = (StrategySubject(kind), caught_by)
        return kind

    return note


def run_mutant(
    name: str,
    caught_by: str,
    config: PrivacyConfig | None = None,
    rows_config: RowsConfig | None = None,
) -> Callable[[type[StrategyRun]], type[StrategyRun]]:
    def note(kind: type[StrategyRun]) -> type[StrategyRun]:
        make = StrategySubject(Averaging, config or PrivacyConfig(), StrategyConfig(), rows_config, run=kind)
        MUTANTS[name] = (make, caught_by)
        return kind

    return note
