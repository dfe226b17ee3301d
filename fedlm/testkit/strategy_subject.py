"""The adapter from a strategy to a subject: the server's side of a round, as the engine runs it, without a network.

All that the kit needs of `PrivacyPlan` is in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from fedlm.codec import split
from fedlm.config.schema import PrivacyConfig, RowsConfig, StrategyConfig
from fedlm.errors import ConfigError
from fedlm.privacy.adaptive.rule import AdaptiveState
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.clipping.clipped_sum import ClippedSum, new_sum
from fedlm.privacy.clipping.query_input import DeviceStats
from fedlm.privacy.clipping.side_queries import DPMetrics, WordMap
from fedlm.privacy.plan import PrivacyPlan
from fedlm.privacy.release import Release
from fedlm.privacy.sampling.cohort_key import CohortKey
from fedlm.randomness import seed_key, stream
from fedlm.registry import COHORT_SAMPLERS
from fedlm.strategies import Strategy, StrategyState
from fedlm.strategies.round_specs import RoundSpecs
from fedlm.strategies.server_step import ServerState, step
from fedlm.testkit.device_stats import device_stats_of
from fedlm.testkit.subject import ClaimedGuarantee, Floats, Outcome, Setting, Subject
from fedlm.testkit.whitened_noise import whitening
from fedlm.trainable.spec import RowIds, UpdateSpec, Vector

StrategyMaker = Callable[[StrategyConfig], Strategy]
_MOMENTS = {"dense": 1.0, "bias": 0.1, "rows": 0.01}
_LATE_ROUND = 1_000


class _Keys:
    """The key file of correlated noise, in memory."""

    def __init__(self, keys: list[int]) -> None:
        self._keys = list(keys)

    def keys(self) -> list[int]:
        """Return the keys of the released rounds, in order."""
        return list(self._keys)

    def append(self, round_number: int, key: int) -> None:
        """Keep the key of a round."""
        self._keys.append(key)


class StrategyRun:
    """A run of a strategy under a privacy plan.

    Arguments:
        strategy: The class, or whatever makes a strategy from its configuration.
        strategy_config, privacy_config: As in the experiment; the setting replaces clip norm, noise and fleet.
        rows_config: Of DP row selection; None: the rows that take part stay.
        setting: Of the kit.
    """

    def __init__(
        self,
        strategy: StrategyMaker,
        strategy_config: StrategyConfig,
        privacy_config: PrivacyConfig,
        rows_config: RowsConfig | None,
        setting: Setting,
    ) -> None:
        self._arguments = (strategy, strategy_config, privacy_config, rows_config, setting)
        self._setting, self._strategy, self._rows_config = setting, strategy(strategy_config), rows_config
        stored = _stored_plan(privacy_config, rows_config, replace(setting, seed=0))
        key = CohortKey.reproducible(setting.seed)
        self._plan = PrivacyPlan.from_json(stored, seed=setting.seed, cohort_key=key)
        self._keys = _Keys([])
        self._plan.keep_keys(self._keys)
        full = _full_spec(setting.size)
        first = self._plan.first_state(full.with_rows(_public_rows(setting.size)))
        values = stream(seed_key(setting.seed), "values").standard_normal(full.size, np.float32)  # (P_full,)
        self._state = ServerState(
            self._strategy.init(full, values), _seasoned(first, self._plan.adaptive_rule.allocation)
        )

    @cached_property
    def claim(self) -> ClaimedGuarantee:
        """What the plan states."""
        rule, mechanism = self._plan.fleet_rule, self._plan.mechanism
        sampler = COHORT_SAMPLERS.resolve(rule.sampler)
        return ClaimedGuarantee(
            noise_multiplier=self._plan.noise_multiplier,
            cohort=self._plan.cohort,
            sampling_probability=rule.sampling_probability if sampler.flips_coins else None,
            matrix=whitening(mechanism),
            separation=rule.separation,
            max_participations=rule.max_participations,
            largest_cohort=sampler.largest_cohort(rule),
            by_report=mechanism.by_report,
        )

    def sample_cohort(self, round_number: int) -> RowIds:
        """Return the plan's cohort."""
        return self._plan.sample_cohort(round_number)

    def round(self, round_number: int, updates: Mapping[int, Vector]) -> Outcome:
        """Add up, release, step."""
        specs, clip = self._open(round_number)
        total = self._sum(clip, updates)
        return self._step(specs, clip, self._release(total, round_number, specs.sends), len(updates))

    def _open(self, round_number: int) -> tuple[RoundSpecs, ClipSpec]:
        """Return what takes part in a round and what clips.

        Raises:
            ConfigError: Devices send less than all blocks, of which the kit's updates consist.
        """
        specs = RoundSpecs.of(self._strategy, _full_spec(self._setting.size), round_number, self._row_ids(round_number))
        if specs.sends.size != self._setting.size:
            raise ConfigError(
                f"{type(self._strategy).__name__}.sends leaves out blocks in round {round_number}; the kit examines "
                "strategies whose devices send all blocks: let it check `step` in a subclass that sends them"
            )
        return specs, self._plan.clip_spec(self._state.privacy, specs.sends, round_number)

    def _row_ids(self, round_number: int) -> RowIds:
        """Return public rows, or those that DP row selection chose, filled up to the same number."""
        public = _public_rows(self._setting.size)
        if self._rows_config is None or round_number <= self._plan.adaptive_rule.selection_rounds:
            return public
        chosen = self._plan.selected_rows(self._state.privacy)
        rest = np.setdiff1d(public, chosen)
        return np.sort(np.append(chosen, rest[: len(public) - len(chosen)]))

    def replay(self, round_number: int, updates: Mapping[int, Vector], release: Floats) -> Outcome:
        """Step on a release of the journal, as a resumed run does."""
        specs, clip = self._open(round_number)
        if self._plan.mechanism.keeps_noise:
            # It goes on from the draws of all earlier rounds; reproducible, they are those of the recording.
            self._plan.release(new_sum(clip, self._setting.size), round_number, specs.sends)
        return self._step(specs, clip, self._split(release, clip, specs.sends), len(updates))

    def restarted(self) -> Subject:
        """Return a new plan and a new strategy with the checkpointed state and the keys on disk."""
        other = type(self)(*self._arguments)
        model = self._state.model
        slots = {name: array.copy() for name, array in model.slots.items()}
        other._state = ServerState(StrategyState(model.values.copy(), slots, model.num_steps), self._state.privacy)
        other._keys = _Keys(self._keys.keys())
        other._plan.keep_keys(other._keys)
        return other

    def _release(self, total: ClippedSum, round_number: int, spec: UpdateSpec) -> Release:
        return self._plan.release(total, round_number, spec)

    def _sum(self, clip_spec: ClipSpec, updates: Mapping[int, Vector]) -> ClippedSum:
        """Return the cohort's sum."""
        total = new_sum(clip_spec, self._setting.size)
        for update in updates.values():
            self._add(total, update)
        return total

    def _add(self, total: ClippedSum, update: Vector) -> None:
        """Add one device's update and its answers to the side queries."""
        total.add(update, self._device_stats(total.clip_spec, update))

    def _device_stats(self, clip_spec: ClipSpec, update: Vector) -> DeviceStats:
        asked = any(isinstance(side_query, DPMetrics | WordMap) for side_query in clip_spec.side_queries)
        return device_stats_of(update, len(_public_rows(self._setting.size)) * 2) if asked else DeviceStats()

    def _step(self, specs: RoundSpecs, clip: ClipSpec, release: Release, num_reports: int) -> Outcome:
        # A strategy may write into the mean.
        flat = np.concatenate([release.mean, *(release.answers[side_query.name] for side_query in clip.side_queries)])
        self._state, diagnostics = step(
            self._strategy, self._plan, self._state, release, clip=clip, changes=specs.changes
        )
        return Outcome(flat.astype(np.float64), self._std(clip, num_reports), self._public(diagnostics, specs))

    def _std(self, clip: ClipSpec, num_reports: int) -> Floats:
        """Return the stated noise (P + Q,) of the mean and of each side query's answer, in their own units."""
        std = np.full(self._setting.size, self._plan.noise_std(clip, num_reports), np.float32)  # (P,)
        if clip.block_scaling:
            clip.block_scaling.restore(std)
            for start, stop, factor in clip.block_scaling.noise_spans():
                std[start:stop] *= np.float32(factor)
        answers = [
            np.full(side_query.size, self._plan.answer_std(side_query, num_reports)) for side_query in clip.side_queries
        ]
        return np.concatenate([std.astype(np.float64), *answers])

    def _split(self, release: Floats, clip: ClipSpec, spec: UpdateSpec) -> Release:
        """Return what the plan released as the flat vector (P + Q,)."""
        place, answers = spec.size, {}
        for side_query in clip.side_queries:
            answers[side_query.name] = release[place : place + side_query.size]
            place += side_query.size
        return Release(spec, release[: spec.size].astype(np.float32), answers, self._plan.noise_std(clip))

    def _public(self, diagnostics: Mapping[str, float], specs: RoundSpecs) -> dict[str, Any]:
        model, privacy = self._state.model, self._state.privacy
        state = {"values": model.values.copy(), "num_steps": np.array(model.num_steps)}
        state["privacy state"] = np.frombuffer(str(split(privacy)[1]).encode(), np.uint8)
        state["row ids"] = np.array(specs.sends.row_ids)
        if privacy.word_scores is not None:
            state["word scores"] = privacy.word_scores.copy()
        state |= {f"slot {name}": array.copy() for name, array in model.slots.items()}
        return state | {f"diagnostic {name}": np.array(value) for name, value in diagnostics.items()}


@dataclass(frozen=True)
class StrategySubject:
    """Makes runs of a strategy: call it with a `Setting`.

    Arguments:
        strategy: The class, or whatever makes a strategy from its configuration.
        privacy_config: Mechanism and options; the setting replaces clip norm, noise and fleet.
        strategy_config: Given to the strategy.
        rows_config: DP selection of embedding rows; the kit sets the count.
        run: The adapter; a subclass changes what it has to.
    """

    strategy: StrategyMaker
    privacy_config: PrivacyConfig = field(default_factory=PrivacyConfig)
    strategy_config: StrategyConfig = field(default_factory=StrategyConfig)
    rows_config: RowsConfig | None = None
    run: type[StrategyRun] = StrategyRun

    def __call__(self, setting: Setting) -> StrategyRun:
        """Return a new run."""
        return self.run(self.strategy, self.strategy_config, self.privacy_config, self.rows_config, setting)


def _seasoned(state: AdaptiveState, kind: str) -> AdaptiveState:
    """Return a state as after many releases: the first rounds of an adaptive allocation have equal noise everywhere."""
    if state.allocation is None or kind not in ("adaptive", "published"):
        return state
    groups = len(state.allocation.scales)
    ascending = tuple(float(value) for value in range(1, groups + 1))
    scales = tuple(2.0 ** (i - 1) for i in range(groups)) if kind == "adaptive" else state.allocation.scales
    late = replace(
        state.allocation, scales=scales, sensitivity=ascending, uncertainty=ascending, num_rounds=_LATE_ROUND
    )
    return replace(state, allocation=late)


@lru_cache(maxsize=64)
def _stored_plan(config: PrivacyConfig, rows: RowsConfig | None, setting: Setting) -> str:
    """Return the text of a plan, made once for all seeds: some mechanisms are optimised, which takes a second."""
    config = replace(
        config,
        enabled=True,
        clip_norm=setting.clip_norm,
        epsilon=0.0,
        noise_multiplier=setting.noise_multiplier,
        population=0,
        expected_cohort=0,
        reproducible_noise=setting.reproducible,
        reproducible_cohorts=False,  # the kit brings keys of its own
    )
    plan = PrivacyPlan.create(
        config,
        rounds=setting.rounds,
        fleet_size=setting.fleet_size,
        cohort=setting.cohort,
        seed=setting.seed,
        rows=replace(rows, sampler="dp_adafest", count=len(_public_rows(setting.size))) if rows else None,
        vocabulary_size=2 * len(_public_rows(setting.size)),
        moments=_MOMENTS if config.allocation != "isotropic" else None,
    )
    return plan.to_json()


@lru_cache(maxsize=8)
def _full_spec(size: int) -> UpdateSpec:
    """Return a spec whose rounds have `size` coordinates when half of its rows take part."""
    if size % 8:
        raise ConfigError(f"size = {size} must be a multiple of 8, so that the kit can lay out its blocks")
    return UpdateSpec.build(
        [("w", "dense", (size // 4,)), ("b", "bias", (size // 4,)), ("input_table", "rows", (2 * (size // 8), 4))]
    )


def _public_rows(size: int) -> RowIds:
    """Return every second row: what takes part where nothing is selected."""
    return np.arange(1, 2 * (size // 8), 2)
