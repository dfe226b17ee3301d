"""Mistakes around a plan: its side queries, row selection, published noise, keys and local noise."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

import numpy as np
from kit_registry import run_mutant

from fedlm.config.schema import OptionValues, PrivacyConfig, RowsConfig
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.clipping.clipped_sum import ClippedSum
from fedlm.privacy.clipping.query_input import DeviceStats
from fedlm.privacy.clipping.side_queries import SideQuery
from fedlm.privacy.mechanisms.gaussian import Gaussian
from fedlm.testkit import ClaimedGuarantee, StrategyRun
from fedlm.trainable.spec import RowIds, Vector

SELECTION_ROUNDS = 2
SELECTION = RowsConfig(options=OptionValues({"selection_rounds": SELECTION_ROUNDS}))
BANDED = PrivacyConfig(mechanism="banded", options=OptionValues({"bands": 2}))


class OwnAnswers(StrategyRun):
    """Writes answers of its own in the place of the side queries', past the clip of answers."""

    def answer(self, side_query: SideQuery, device_stats: DeviceStats) -> Any:
        raise NotImplementedError

    def _add(self, total: ClippedSum, update: Vector) -> None:
        before, place = total._live()[total.size :].copy(), total.size
        super()._add(total, update)
        if not np.isfinite(update).all():
            return
        total._live()[place:] = before
        for side_query in total.clip_spec.side_queries:
            answer = self.answer(side_query, self._device_stats(total.clip_spec, update)) * (
                side_query.share / side_query.bound * 2.0**40
            )
            total._live()[place : place + side_query.size] += np.clip(answer, -(2**50), 2**50).astype(np.int64)
            place += side_query.size


@run_mutant("a DP metric without clip", "clip bound", PrivacyConfig(metrics=("train_loss",)))
class _LooseMetric(OwnAnswers):
    def answer(self, side_query: SideQuery, device_stats: DeviceStats) -> Any:
        return np.array([np.nan_to_num(device_stats.loss) / 20, 1.0])


@run_mutant("a word map that is not normalised", "clip bound", None, SELECTION)
class _LooseWords(OwnAnswers):
    def answer(self, side_query: SideQuery, device_stats: DeviceStats) -> Any:
        return np.bincount(np.unique(device_stats.words), minlength=side_query.size).astype(np.float64)


@run_mutant("rows selected by raw words", "post-processing", None, SELECTION)
class _RawSelection(StrategyRun):
    def _device_stats(self, clip_spec: ClipSpec, update: Vector) -> DeviceStats:
        found = super()._device_stats(clip_spec, update)
        self.raw_words = found.words if clip_spec.side_queries else self.raw_words
        return found

    def _row_ids(self, round_number: int) -> RowIds:
        rows = super()._row_ids(round_number)
        if round_number <= SELECTION_ROUNDS or not hasattr(self, "raw_words"):
            return rows
        rest = np.setdiff1d(rows, self.raw_words)
        return np.sort(np.append(np.unique(self.raw_words), rest)[: len(rows)])


@run_mutant("answers of side queries added after the noise", "dense support", PrivacyConfig(clip_quantile=0.5))
class _LateAnswers(StrategyRun):
    def _release(self, total: Any, round_number: int, spec: Any) -> Any:
        side_query, answer = total.clip_spec.side_queries[0], total.to_arrays()[0][total.size :].astype(np.float64)
        exact = {side_query.name: answer * (side_query.bound / side_query.share / 2.0**40 / self._setting.cohort)}
        return replace(super()._release(total, round_number, spec), answers=exact)


@run_mutant("published allocation accounted at its nominal noise", "clip bound", PrivacyConfig(allocation="published"))
class _Nominal(StrategyRun):
    @property
    def claim(self) -> ClaimedGuarantee:
        nominal = self._plan.noise_multiplier / self._plan.adaptive_rule.noise_floor
        return ClaimedGuarantee(nominal, self._plan.cohort, self._plan.sampling_probability)


@run_mutant("correlated noise with the keys of rounds that were never released", "fresh noise", BANDED)
class _KeyAgain(StrategyRun):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kept: dict[int, int] = {}
        self._plan._noise._key = lambda t: self.kept.setdefault(t, secrets.randbits(128))

    def restarted(self) -> Any:
        other = super().restarted()
        other.kept = self.kept
        return other


@run_mutant("correlated noise that begins again after a restart", "fresh noise", BANDED)
class _BuffersLost(StrategyRun):
    def restarted(self) -> Any:
        other: Any = super().restarted()
        noise, done = other._plan._noise, len(self._keys.keys())

        def begun(size: int) -> Any:
            noise._done = done
            return other._plan.mechanism.new_noise(size)

        noise._replayed = begun
        return other


@run_mutant("local noise of one device for all", "noise law", PrivacyConfig(mechanism="local"))
class _OneNoise(StrategyRun):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._plan._noise._mechanism = Gaussian(self._plan.mechanism.participation)


@run_mutant("a plan whose noise stays at the first clip norm", "noise law", PrivacyConfig(clip_quantile=0.5))
class _FirstNorm(StrategyRun):
    def _release(self, total: Any, round_number: int, spec: Any) -> Any:
        growth, size = self._setting.clip_norm / total.clip_spec.clip_norm, total.size
        clean = total.to_arrays()[0][:size] * (
            total.clip_spec.unit / total.clip_spec.update_share / self._setting.cohort
        )
        released = super()._release(total, round_number, spec)
        return replace(released, mean=(clean + growth * (released.mean - clean)).astype(np.float32))
