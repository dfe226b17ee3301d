"""Mistakes of a strategy, and of what passes it the plan's releases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from kit_registry import MUTANTS, Averaging, run_mutant, strategy_mutant

from fedlm.privacy.clipping.clipped_sum import new_sum
from fedlm.strategies import Release, StrategyState
from fedlm.testkit import StrategyRun, StrategySubject


@run_mutant("a sum doubled behind the plan's back", "clip bound")
class _Doubles(StrategyRun):
    def _sum(self, clip_spec: Any, updates: Any) -> Any:
        total = super()._sum(clip_spec, updates)
        vector = total._live()
        vector *= 2
        return total


@run_mutant("a round whose empty cohort releases nothing", "clip bound")
class _Skips(StrategyRun):
    def _release(self, total: Any, round_number: int, spec: Any) -> Any:
        num_devices = total.num_devices
        release = super()._release(total, round_number, spec)
        return release if num_devices else replace(release, mean=np.full(spec.size, np.nan, np.float32))


_seen: list[float] = []
"""What the strategies below learn by ways around the contract: a process can always look elsewhere."""


class _Peeking(StrategyRun):
    """A run whose strategy gets hold of the raw sum."""

    def _sum(self, clip_spec: Any, updates: Any) -> Any:
        total = super()._sum(clip_spec, updates)
        _seen[:] = [float(np.sum(total._live().astype(np.float64))), float(total.num_devices)]
        return total


class _Tells(Averaging):
    def step(self, state: StrategyState, release: Release) -> tuple[StrategyState, dict[str, float]]:
        state, diagnostics = super().step(state, release)
        return state, diagnostics | {"raw": _seen[0]}


class _Counts(Averaging):
    def update(self, state: StrategyState, release: Release) -> tuple[Any, dict[str, float]]:
        values, diagnostics = super().update(state, release)
        return values * np.float32(1 - 1e-3 * _seen[1]), diagnostics


MUTANTS["a strategy that tells the raw sum"] = (StrategySubject(_Tells, run=_Peeking), "post-processing")
MUTANTS["a strategy that counts the reports"] = (StrategySubject(_Counts, run=_Peeking), "post-processing")


@strategy_mutant("a strategy that counts its rounds on the object", "post-processing")
class _Remembers(Averaging):
    rounds = 0

    def update(self, state: StrategyState, release: Release) -> tuple[Any, dict[str, float]]:
        self.rounds += 1
        values, diagnostics = super().update(state, release)
        return values * np.float32(1 + 1e-3 * self.rounds), diagnostics


@run_mutant("the plan's release, scaled to the realised cohort", "record and replay")
class _Rescaled(StrategyRun):
    def _release(self, total: Any, round_number: int, spec: Any) -> Any:
        sampled = max(1, len(self.sample_cohort(round_number)))
        released = super()._release(total, round_number, spec)
        return replace(released, mean=released.mean * np.float32(self._setting.cohort / sampled))


@run_mutant("the plan's release, smoothed over neighbouring coordinates", "noise law")
class _Smoothed(StrategyRun):
    def _release(self, total: Any, round_number: int, spec: Any) -> Any:
        released = super()._release(total, round_number, spec)
        return replace(released, mean=(released.mean + np.roll(released.mean, 1)) / np.float32(np.sqrt(2)))


@run_mutant("the plan's release in half precision", "noise law")
class _HalfRelease(StrategyRun):
    def _release(self, total: Any, round_number: int, spec: Any) -> Any:
        released = super()._release(total, round_number, spec)
        return replace(released, mean=released.mean.astype(np.float16).astype(np.float32))


@run_mutant("the mean of two releases of one sum", "noise law")
class _TwoReleases(StrategyRun):
    def _release(self, total: Any, round_number: int, spec: Any) -> Any:
        vector, _ = total.to_arrays()
        other = type(self)(*self._arguments)
        again = new_sum(total.clip_spec, total.size)
        again._live()[:] = vector
        one, two = super()._release(total, round_number, spec), other._plan.release(again, round_number, spec)
        return replace(one, mean=(one.mean + two.mean) / 2)
