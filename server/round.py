"""A round as one frozen object: who is asked, who takes part, which coordinates, what clips. Made once, passed down."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedlm.config.schema import OptionValues, RowsConfig
from fedlm.errors import ConfigError
from fedlm.example_dp.device_budget import device_budget
from fedlm.experiment import Experiment
from fedlm.privacy.adaptive.allocation import groups_of
from fedlm.privacy.adaptive.rule import AdaptiveState
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.plan import PrivacyPlan
from fedlm.randomness import round_key
from fedlm.strategies import Strategy
from fedlm.strategies.round_specs import RoundSpecs, Schedule
from fedlm.trainable.rows import row_set
from fedlm.trainable.spec import RowIds, UpdateSpec
from server.participation import Fleet, RoundParticipation, RoundTask
from server.payload import DownloadMeter


@dataclass(frozen=True, eq=False)
class Round:
    """One round before its devices train.

    Arguments:
        number: t, from 1.
        participation: What becomes of each device of the cohort; its task has the cohort.
        specs: What moves, what travels, what changes.
        clip: What the devices clip with.
        key: Of everything random that devices may know.
        noise_std: Of a coordinate of the round's noised mean; 0 without noise.
    """

    number: int
    participation: RoundParticipation
    specs: RoundSpecs
    clip: ClipSpec
    key: bytes
    noise_std: float

    @property
    def row_ids(self) -> RowIds:
        """The round's public row set (S,)."""
        rows = self.specs.moves.row_ids
        assert rows is not None, "a round's spec has a row set, if an empty one"
        return rows


class RoundOpener:
    """Opens the rounds of a run, in order, and counts what its devices download and upload.

    All that it decides follows from the plan's secret, from public data and from releases, so a resumed run, which
    counts its earlier rounds again, opens the same rounds.

    Arguments:
        plan, strategy, experiment, fleet: Of the run.
        spec: Every block that the server may change.
    """

    def __init__(
        self, plan: PrivacyPlan, strategy: Strategy, experiment: Experiment, fleet: Fleet, spec: UpdateSpec
    ) -> None:
        self._plan, self._strategy, self._experiment, self._fleet, self._spec = plan, strategy, experiment, fleet, spec
        self.ledger = plan.new_ledger()
        self.bytes_up = self.bytes_down = 0
        self._budget = device_budget(experiment.config)
        self._meter = DownloadMeter(spec, plan.fleet_size, plan.rounds)
        self._recent: dict[int, RoundSpecs] = {}

    def first_state(self) -> AdaptiveState:
        """Return what the plan knows before round 1."""
        return self._plan.first_state(self._specs_with(1, self._public_rows(1)).sends)

    def open(self, t: int, state: AdaptiveState) -> Round:
        """Sample a round's cohort and decide what it does, from what the rounds before it have released.

        Raises:
            BudgetExceededError: A device would come too early or too often.
        """
        specs = self.specs(t, state)
        clip = self._plan.clip_spec(state, specs.sends, t)
        key = round_key(self._experiment.config.seed, t)
        return Round(t, self._participation(t, specs, clip), specs, clip, key, self._plan.noise_std(clip))

    def count(self, t: int, state: AdaptiveState) -> None:
        """Count the devices and bytes of a round that is over; `state` is of a later one."""
        specs = self.specs(t, state)
        # Its clip norm is another; what devices send has the size that it had.
        self._participation(t, specs, self._plan.clip_spec(state, specs.sends, t))

    def _participation(self, t: int, specs: RoundSpecs, clip: ClipSpec) -> RoundParticipation:
        """Sample a round's cohort, see who takes part, and count its bytes."""
        cohort = self._plan.sample_cohort(t)
        self.ledger.record(t, cohort)
        encoded_bytes = clip.encoder.num_bytes if clip.encoder else 0
        bytes_down = self._meter.download(cohort, specs.moves)
        task = RoundTask(t, cohort, specs.sends, bytes_down, clip.num_answers, encoded_bytes)
        participation = self._fleet.participation(task).without(self._spent(cohort))
        self._meter.visited(cohort[participation.visited], t)
        self._meter.changed(specs.changes, t)
        self.bytes_up += int(participation.bytes_up.sum())
        self.bytes_down += int(participation.bytes_down.sum())
        return participation

    def specs(self, t: int, state: AdaptiveState) -> RoundSpecs:
        """Return what moves, travels and changes in a round; `state` is of this round or a later one."""
        if t not in self._recent:
            self._recent = {number: specs for number, specs in self._recent.items() if number > t - 3}
            self._recent[t] = self._specs_with(t, self._row_ids(t, state))
        return self._recent[t]

    def noise_std(self, t: int, state: AdaptiveState) -> float:
        """Return the standard deviation of a coordinate of a round's noised mean."""
        return self._plan.noise_std(self._plan.clip_spec(state, self.specs(t, state).sends, t))

    def _specs_with(self, t: int, row_ids: RowIds) -> RoundSpecs:
        return RoundSpecs.of(self._strategy, self._spec, t, row_ids)

    def _row_ids(self, t: int, state: AdaptiveState) -> RowIds:
        """Return the row set of a round: public, or what earlier releases have chosen."""
        config = self._experiment.config.trainable.embedding_rows
        if self._plan.enabled and 0 < self._plan.adaptive_rule.selection_rounds < t:
            chosen = self._plan.selected_rows(state)
            # No word may stand out of the noise: then the public guess.
            guess = replace(config, sampler="top_k", options=OptionValues())
            return chosen if len(chosen) else self._public_rows(t, guess)
        return self._public_rows(t)

    def _public_rows(self, t: int, config: RowsConfig | None = None) -> RowIds:
        experiment = self._experiment
        rows = config or experiment.config.trainable.embedding_rows
        return row_set(rows, experiment.vocabulary.frequencies, seed=experiment.config.seed, round_number=t)

    def _spent(self, cohort: RowIds) -> npt.NDArray[np.bool_]:
        """Return which devices (U,) of the recorded round's cohort have spent their own budget (`local.example_dp`)."""
        if self._budget is None:
            return np.zeros(len(cohort), np.bool_)
        return np.asarray(self.ledger.participations(cohort) > self._budget.max_rounds)


def check_switches(strategy: Strategy, spec: UpdateSpec, plan: PrivacyPlan, *, has_canaries: bool) -> None:
    """Refuse a strategy that sends other blocks in other rounds where the noise cannot follow.

    Raises:
        ConfigError: Noise correlated over the rounds, or allocated to kinds of blocks that change; an audit.
    """
    schedule = Schedule.of(strategy, spec, plan.rounds, np.empty(0, np.int64))
    sent = [specs.sends for specs in schedule.rounds]
    name, first = type(strategy).__name__, sent[0]
    if has_canaries and any(one.names != spec.names for one in sent):
        raise ConfigError(f"{name} does not send all blocks; an audit's canaries need all blocks in every round")
    if plan.enabled and plan.mechanism.keeps_noise and any(one.names != first.names for one in sent):
        raise ConfigError(
            f"{name} sends other blocks in other rounds, but privacy.mechanism = {plan.mechanism.name!r} subtracts "
            "later what it added before; choose gaussian"
        )
    allocation = plan.adaptive_rule.allocation if plan.enabled else "isotropic"
    if allocation != "isotropic" and any(groups_of(one) != groups_of(first) for one in sent):
        raise ConfigError(
            f"{name} sends other kinds of blocks in other rounds, among which privacy.allocation = {allocation!r} "
            "cannot allocate noise; set it to isotropic"
        )
