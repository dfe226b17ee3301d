"""Mistakes of a strategy, and of what passes it the plan's releases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from kit_registry import Averaging, run_mutant, strategy_mutant

from fedlm.privacy.testkit import StrategyRun
from fedlm.strategy import Release, StrategyState


@strategy_mutant("a strategy that doubles a sum behind its back", "clip bound")
class _Writes(Averaging):
    def accumulate(self, state: StrategyState, contribution: Any) -> StrategyState:
        vector = contribution._live()
        vector *= 2
        return super().accumulate(state, contribution)


@strategy_mutant("a strategy that keeps the raw sum", "post-processing")
class _Keeps(Averaging):
    def finish(self, state: StrategyState, release: Release) -> tuple[StrategyState, dict[str, float]]:
        vector, _ = state.total.to_arrays()
        raw = float(np.sum(vector.astype(np.float64)))
        state, diagnostics = super().finish(state, release)
        return state, diagnostics | {"raw": raw}


@strategy_mutant("a strategy that counts its contributions", "post-processing")
class _Counts(Averaging):
    seen = 0

    def accumulate(self, state: StrategyState, contribution: Any) -> StrategyState:
        self.seen += contribution.num_devices
        return super().accumulate(state, contribution)

    def step(self, state: StrategyState, values: Any, mean: Any) -> tuple[Any, dict[str, float]]:
        values, diagnostics = super().step(state, values, mean)
        return values * np.float32(1 - 1e-3 * self.seen), diagnostics


@strategy_mutant("a strategy that skips empty rounds", "clip bound")
class _Skips(Averaging):
    def finish(self, state: StrategyState, release: Release) -> tuple[StrategyState, dict[str, float]]:
        if not state.total.num_devices:
            return replace(state, total=None, num_steps=state.num_steps + 1), {}
        return super().finish(state, release)


@strategy_mutant("a strategy that steps on its own copy of the sum", "post-processing")
class _OwnCopy(Averaging):
    copied = 0

    def accumulate(self, state: StrategyState, contribution: Any) -> StrategyState:
        self.copied = self.copied + contribution.to_arrays()[0]
        return super().accumulate(state, contribution)

    def step(self, state: StrategyState, values: Any, mean: Any) -> tuple[Any, dict[str, float]]:
        raw, self.copied = np.asarray(self.copied, np.float32)[: len(values)], 0
        return values + raw * np.float32(2**-40), {}


@run_mutant("the plan's release, scaled to the realised cohort", "record and replay")
class _Rescaled(StrategyRun):
    def _release(self, total: Any, round_number: int) -> Any:
        sampled = max(1, len(self.sample_cohort(round_number)))
        released = super()._release(total, round_number)
        return replace(released, mean=released.mean * np.float32(self._setting.cohort / sampled))


@run_mutant("the plan's release, smoothed over neighbouring coordinates", "noise law")
class _Smoothed(StrategyRun):
    def _release(self, total: Any, round_number: int) -> Any:
        released = super()._release(total, round_number)
        return replace(released, mean=(released.mean + np.roll(released.mean, 1)) / np.float32(np.sqrt(2)))


@run_mutant("the plan's release in half precision", "noise law")
class _HalfRelease(StrategyRun):
    def _release(self, total: Any, round_number: int) -> Any:
        released = super()._release(total, round_number)
        return replace(released, mean=released.mean.astype(np.float16).astype(np.float32))


@run_mutant("the mean of two releases of one sum", "noise law")
class _TwoReleases(StrategyRun):
    def _release(self, total: Any, round_number: int) -> Any:
        vector, _ = total.to_arrays()
        other = type(self)(*self._arguments)
        again = total.clipper.new_sum(total.size)
        again._live()[:] = vector
        one, two = super()._release(total, round_number), other._plan.release(again, round_number)
        return replace(one, mean=(one.mean + two.mean) / 2)
