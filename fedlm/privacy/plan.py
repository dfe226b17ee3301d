"""The privacy plan: sampler, clip spec, mechanism and accounting of one experiment, made together or not at
all.

One release is `sum of clipped updates / n + noise of standard deviation z C / n`, n the *expected* cohort
(DP-FedAvg, McMahan et al. 2018, https://arxiv.org/abs/1710.06963); the mechanism says how the noise of the
rounds is correlated, who may be in a cohort, and what T releases cost (`fedlm.privacy.mechanisms`).
Everything that the guarantee rests on is fixed in one frozen object before the first round, from public
numbers alone. What changes from round to round (clip norm, scales, row set) is an `AdaptiveState`, a function
of releases.

A run stores `to_json()` once and resumes with `from_json`, which takes the noise multiplier as stored:
calibrating again could give another one under another version of the accountant. The text holds no secret:
the key of the cohorts is kept beside it, for the operator's eyes alone (`fedlm.privacy.sampling.cohort_key`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, fields, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from fedlm.codec import from_text
from fedlm.config.schema import PrivacyConfig, RowsConfig
from fedlm.errors import BudgetExceededError, ConfigError, DataError
from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.privacy.adaptive.rule import AdaptiveRule, AdaptiveState
from fedlm.privacy.calibration import mechanism_of, noise_multiplier_of
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.clipping.clipped_sum import ClippedSum, new_sum
from fedlm.privacy.guarantee import Guarantee, check_budget
from fedlm.privacy.noise.fixed_point import FRACTION_BITS, FloatVector, IntVector
from fedlm.privacy.noise.lattice import MAX_STD
from fedlm.privacy.noise.skellam_encoding import Skellam
from fedlm.privacy.plan_parameters import PlanParameters
from fedlm.privacy.release import Floats, Release
from fedlm.privacy.released_once import ReleasedOnce
from fedlm.privacy.run_noise import KeyStore, RunNoise
from fedlm.privacy.sampling import cohorts
from fedlm.privacy.sampling.cohort_key import CohortKey
from fedlm.privacy.sampling.cohorts import DeviceIds, ParticipationLedger
from fedlm.privacy.statement import guarantee, parameters
from fedlm.ranges import require_count, require_number
from fedlm.registry import COHORT_SAMPLERS
from fedlm.trainable.spec import UpdateSpec, Vector

_TOKEN = object()
_CHUNK = 65_536
_LARGEST_GAIN = (
    64  # of correlated noise over its largest draw: about 2 for BLT and banded, 34 for a tree over 2,000 rounds
)
_NO_DEVICES = "the corpus needs at least one training user"


@dataclass(frozen=True)
class PrivacyPlan(PlanParameters):
    """The only way to sample, clip, sum and release; fields as in `PlanParameters`.

    Guarantee:
        The vectors returned by `release`, all T together, are (epsilon(T), delta)-differentially private
        with respect to adding or removing one user, if each device is added at most once a round and only in
        rounds whose cohort has it, the cohort key stays secret, and nothing else leaves. The seed is public, unless
        noise or cohorts are declared to follow from it, which a stamp then says.

    Edge cases:
        Dropouts and non-finite updates count as zero; an empty cohort releases noise; a sum or a round is
        released once; the release after the last planned one is refused.
    """

    seed: int = field(repr=False)
    cohort_key: CohortKey | None = field(repr=False, compare=False)
    _token: InitVar[object]
    _released: ReleasedOnce = field(
        init=False, repr=False, compare=False, default_factory=partial(ReleasedOnce, "round")
    )
    _cohort_sizes: dict[int, int] = field(init=False, repr=False, compare=False, default_factory=dict)
    _noise: RunNoise = field(init=False, repr=False, compare=False)

    def __post_init__(self, _token: object) -> None:
        """Check every number; the same checks serve `create` and `from_json`."""
        if _token is not _TOKEN:
            raise TypeError("PrivacyPlan cannot be built directly; use PrivacyPlan.create or from_json")
        require_count("seed", self.seed, fix="set seed")
        most = min(self.fleet_size, _largest_cohort(ClipSpec(self.clip_norm).capacity))
        _require_fleet(self.rounds, self.fleet_size, self.cohort, most=most)
        _require_population(self.population, self.expected_cohort)
        require_number("privacy.delta", self.delta, low=subsampled_gaussian.MIN_DELTA, high=0.1)
        require_number("privacy.epsilon", self.epsilon_target, low=0)
        rule = self.mechanism.participation
        if (rule.population, rule.cohort, rule.rounds) != (self.population, self.expected_cohort, self.rounds):
            raise ConfigError(f"mechanism for {rule} contradicts the plan; make the plan with PrivacyPlan.create")
        if self.enabled != (self.noise_multiplier > 0) or self.enabled != (self.clip_norm < math.inf):
            raise ConfigError(
                f"clip norm {self.clip_norm} and noise multiplier {self.noise_multiplier} contradict "
                f"privacy.enabled = {self.enabled}; make the plan with PrivacyPlan.create"
            )
        COHORT_SAMPLERS.resolve(self.fleet_rule.sampler).check_turns(self.fleet_rule)
        if self.enabled:
            largest = MAX_STD / _LARGEST_GAIN if self.mechanism.keeps_noise else MAX_STD
            most_z = largest / 2.0**FRACTION_BITS * self.expected_cohort / self.cohort
            require_number("noise multiplier", self.noise_multiplier, above=0, high=most_z, fix="raise epsilon")
        if self.enabled and self.mechanism.keeps_noise and self.adaptive_rule.changes_coordinates:
            raise ConfigError(
                f"privacy.mechanism = {self.mechanism.name!r} subtracts later what it added before, so clip norm, "
                "scales and rows must stay; set privacy.clip_quantile = 0 and privacy.allocation to isotropic or public"
            )
        if self.mimics and not self.mechanism.supports_mimicry:
            raise ConfigError(
                f"privacy.mechanism = {self.mechanism.name!r} has the devices add the noise, which cannot be that of "
                f"another fleet ({self.expected_cohort:,} of {self.population:,}); set privacy.population = 0 and "
                "privacy.expected_cohort = 0"
            )
        object.__setattr__(self, "_noise", RunNoise(self.mechanism, self.seed if self.reproducible_noise else None))

    @classmethod
    def create(
        cls,
        config: PrivacyConfig,
        *,
        rounds: int,
        fleet_size: int,
        cohort: int,
        seed: int,
        cohort_key: CohortKey | None = None,
        rows: RowsConfig | None = None,
        vocabulary_size: int = 0,
        moments: Mapping[str, float] | None = None,
        importance: Mapping[str, float] | None = None,
        size: int = 0,
    ) -> PrivacyPlan:
        """Return the plan of an experiment; the noise multiplier is calibrated to epsilon unless it is given.

        Arguments:
            config: The section [privacy].
            rounds: T, how many releases there will be.
            fleet_size: Devices that can be sampled.
            cohort: Expected devices a round.
            seed: The experiment's, which is public; of reproducible noise and reproducible cohorts alone.
            cohort_key: The secret that decides the cohorts; None draws one from the operating system.
            rows: The section [trainable.embedding_rows], when rows train.
            vocabulary_size: V; for row selection.
            moments, importance: Public m_g and w_g by kind of block; for the public and per-group allocation.
            size: The most coordinates of any round, answers to side queries included; for Skellam noise.

        Raises:
            ConfigError: A number out of range, or neither epsilon nor noise multiplier.
            BudgetExceededError: Both are given and `rounds` releases cost more than epsilon.
        """
        population, expected = config.population or fleet_size, config.expected_cohort or cohort
        _require_fleet(rounds, fleet_size, cohort, most=fleet_size)
        _require_population(population, expected)
        mechanism = mechanism_of(config, rounds, population, expected, fleet_size // cohort, size)
        noise = noise_multiplier_of(config, mechanism) if config.enabled else 0.0
        adaptive_rule = AdaptiveRule.create(
            config,
            noise_multiplier=noise,
            expected_cohort=expected,
            rows=rows,
            vocabulary_size=vocabulary_size,
            moments=moments,
            importance=importance,
        )
        return cls(
            enabled=config.enabled,
            noise_multiplier=noise,
            epsilon_target=float(config.epsilon) if config.enabled else 0.0,
            rounds=rounds,
            delta=float(config.delta),
            population=population,
            expected_cohort=expected,
            fleet_size=fleet_size,
            cohort=cohort,
            reproducible_noise=config.reproducible_noise,
            reproducible_cohorts=config.reproducible_cohorts,
            mechanism=mechanism,
            adaptive_rule=adaptive_rule,
            seed=seed,
            cohort_key=CohortKey.reproducible(seed) if config.reproducible_cohorts else cohort_key or CohortKey.fresh(),
            _token=_TOKEN,
        )._within_budget()

    @classmethod
    def from_json(cls, text: str, *, seed: int, cohort_key: CohortKey | None) -> PrivacyPlan:
        """Return the plan that `to_json` stored, bit for bit.

        Arguments:
            text: Of `to_json`.
            seed: The experiment's.
            cohort_key: The run's; None if it was deleted: such a plan samples nobody any more. Reproducible cohorts
                follow from the seed instead.

        Raises:
            DataError: Not the text of a plan.
            ConfigError: A number out of range.
            BudgetExceededError: Its noise does not keep its own budget.
        """
        plan_parameters = from_text(PlanParameters, text, where="stored privacy plan")
        stored = {item.name: getattr(plan_parameters, item.name) for item in fields(plan_parameters)}
        key = CohortKey.reproducible(seed) if plan_parameters.reproducible_cohorts else cohort_key
        return cls(**stored, seed=seed, cohort_key=key, _token=_TOKEN)._within_budget()

    def first_state(self, spec: UpdateSpec) -> AdaptiveState:
        """Return what is known before round 1; `spec` is any round's."""
        return self.adaptive_rule.first_state(spec) if self.enabled else AdaptiveState(self.clip_norm)

    def clip_spec(self, state: AdaptiveState, spec: UpdateSpec, round_number: int) -> ClipSpec:
        """Return what a round's nodes need to clip and to sum: no seed, no noise.

        Arguments:
            state: After the rounds before it.
            spec: The round's.
            round_number: t.
        """
        if not self.enabled:
            return ClipSpec(self.clip_norm)
        return self._encoding(self.adaptive_rule.clip_spec(state, spec, round_number), spec.size, round_number)

    def encoder(self, size: int) -> Skellam | None:
        """Return how a round's devices encode `size` coordinates, answers included; None where the server adds noise.

        Raises:
            ConfigError: More coordinates than are accounted.
        """
        if not self.enabled:
            return None
        return self.mechanism.encoder(self.noise_multiplier, delta=self.delta, size=size)

    def next_state(self, state: AdaptiveState, release: Release, *, clip: ClipSpec, values: Vector) -> AdaptiveState:
        """Return the state after a round, from its release and public values alone.

        Arguments:
            state: Of the round.
            release: What left.
            clip: What the round's devices clipped with.
            values: (P,) the model's values in the round, in the coordinates of the release.
        """
        return self.adaptive_rule.next(state, release, clip_spec=clip, values=values) if self.enabled else state

    def selected_rows(self, state: AdaptiveState) -> npt.NDArray[np.int64]:
        """Return the sorted ids of the embedding rows that DP row selection chose; see `AdaptiveRule.selected_rows`."""
        std = self.query_std(1.0, self.adaptive_rule.selection_share)
        return self.adaptive_rule.selected_rows(state, answer_std=std)

    def sample_cohort(self, round_number: int) -> DeviceIds:
        """Return the sorted ids of the devices in a round's cohort (`fedlm.privacy.sampling.cohorts`).

        Returns:
            (realised cohort,) int64; possibly empty.

        Raises:
            DataError: The key of the cohorts was deleted.
        """
        require_count("round", round_number, high=self.rounds)
        if self.cohort_key is None:
            raise DataError(
                "the cohorts of this run cannot be told any more, their key was deleted when it ended; "
                "set privacy.keep_cohort_key = true to keep it"
            )
        cohort = cohorts.sample_cohort(self.fleet_rule, key=self.cohort_key, round_number=round_number)
        # Their noise is shared out among so many; that a cohort is larger has a part of delta.
        cohort = cohort[: self.mechanism.largest_cohort]
        self._cohort_sizes[round_number] = len(cohort)
        return cohort

    def new_ledger(self) -> ParticipationLedger:
        """Return an empty ledger of who takes part, with this plan's limits."""
        return ParticipationLedger(self.fleet_rule)

    def new_sum(self, size: int) -> ClippedSum:
        """Return an empty sum of `size` coordinates for a round without side queries or scales."""
        return new_sum(self._encoding(ClipSpec(self.clip_norm), size, round_number=0), size)

    def keep_keys(self, store: KeyStore) -> None:
        """Keep the keys of correlated noise in a store, and continue after the rounds whose keys it holds."""
        if self.enabled and self.mechanism.keeps_noise:
            self._noise.use_store(store)

    def release(self, total: ClippedSum, round_number: int, spec: UpdateSpec | None = None) -> Release:
        """Return the noised means of a round: the only data of the devices that may leave.

        Arguments:
            total: The sum over all devices of the round that reported; emptied by this call.
            round_number: In 0..rounds; each once.
            spec: What the devices sent, (P,); None: one dense block.

        Returns:
            mean: (P,) fp32: total / cohort + N(0, (z C / expected_cohort)^2), correlated over the rounds as the
            mechanism says; without noise when not enabled. With the answers to the round's side queries.

        Raises:
            DataError: Not a sum of this plan, or of more devices than the round's cohort has.
            BudgetExceededError: The round, the sum or all planned releases are already spent.
        """
        self._check_sum(total, round_number)
        spec = UpdateSpec.flat(total.size) if spec is None else spec
        if total.size != spec.size:
            raise DataError(f"cannot release a sum of {total.size:,} coordinates for a round of {spec.size:,}")
        total._live()
        self._released.claim(round_number, most=self.rounds if self.enabled else math.inf)
        clip_spec, num_devices = total.clip_spec, total.num_devices
        vector = total._take()  # (P + Q,) int64, or (padded,) encoded
        if clip_spec.encoder:
            vector = self._noise.decode(vector, clip_spec.encoder, round_number=round_number, num_devices=num_devices)
        elif self.enabled:
            std = self.noise_multiplier * 2.0**FRACTION_BITS * (self.cohort / self.expected_cohort)
            reports = num_devices * self.expected_cohort / self.cohort
            self._noise.add_to(vector, std, round_number=round_number, clip_spec=clip_spec, num_reports=reports)
        return self._means(vector, spec, clip_spec)

    def _check_sum(self, total: ClippedSum, round_number: int) -> None:
        is_ours = type(total) is ClippedSum and (total.clip_norm < math.inf) == self.enabled
        if not is_ours or not (self.adaptive_rule.clip_quantile or total.clip_norm == self.clip_norm):
            found = getattr(total, "clip_norm", type(total).__name__)
            raise DataError(f"cannot release {found}; give a sum made by this plan (clip norm {self.clip_norm})")
        found, wanted = total.clip_spec.encoder, self.encoder(total.size + total.clip_spec.num_answers)
        if found and wanted and self.reproducible_noise:
            wanted = replace(wanted, debug_key=found.debug_key)
        if found != wanted:
            raise DataError(
                f"cannot release a sum whose devices added other noise than that of the mechanism "
                f"{self.mechanism.name!r}; make it with this plan's clip spec"
            )
        known = self._cohort_sizes
        sampled = known[round_number] if round_number in known else len(self.sample_cohort(round_number))
        if total.num_devices > sampled:
            raise DataError(
                f"sum of {total.num_devices:,} devices, but round {round_number} sampled {sampled:,}; "
                "a device was added twice or uninvited"
            )

    def _encoding(self, clip_spec: ClipSpec, size: int, round_number: int) -> ClipSpec:
        """Return the clip spec of an update of `size` coordinates, with an encoder where devices add the noise."""
        encoder = self.encoder(size + clip_spec.num_answers)
        if encoder is None:
            return clip_spec
        return replace(clip_spec, encoder=replace(encoder, debug_key=self._noise.device_key(round_number)))

    def _means(self, vector: IntVector, spec: UpdateSpec, clip_spec: ClipSpec) -> Release:
        """Return update and answers from the noised integers, each in its own units."""
        size = spec.size
        mean = _scaled(vector[:size], clip_spec.unit / self.cohort / clip_spec.update_share)
        if clip_spec.block_scaling:
            clip_spec.block_scaling.restore(mean)
        answers: dict[str, Floats] = {}
        place = size
        for side_query in clip_spec.side_queries:
            scale = clip_spec.unit / (side_query.share * clip_spec.clip_norm / side_query.bound) / self.cohort
            answers[side_query.name] = vector[place : place + side_query.size].astype(np.float64) * scale
            place += side_query.size
        return Release(spec, mean, answers, self.noise_std(clip_spec))

    def check_release(self, num_releases_so_far: int) -> None:
        """Raise `BudgetExceededError` if one more release would go beyond the T that are paid for."""
        done = require_count("num_releases_so_far", num_releases_so_far)
        if self.enabled and done >= self.rounds:
            raise BudgetExceededError(
                f"{done:,} releases were made, {self.rounds:,} are paid for; start a new run with more rounds"
            )

    def guarantee(self) -> Guarantee:
        """Return what all releases together guarantee each user."""
        return guarantee(self)

    def parameters(self) -> dict[str, object]:
        """Return the public numbers that the guarantee rests on, JSON-ready."""
        return parameters(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse pickling and copying: a copy would release rounds again, and the plan holds the key of the cohorts."""
        raise TypeError(
            "PrivacyPlan is neither pickled nor copied; send the round's clip_spec to nodes, store plan.to_json()"
        )

    def _within_budget(self) -> PrivacyPlan:
        """Return the plan if its T releases cost at most its epsilon."""
        if self.enabled and self.epsilon_target:
            check_budget(
                self.epsilon(self.rounds),
                self.epsilon_target,
                what=f"noise multiplier {self.noise_multiplier:.4g} over {self.rounds:,} rounds",
                fix="set privacy.noise_multiplier = 0 to calibrate it, or privacy.epsilon = 0 to accept the cost",
            )
        return self


def _require_fleet(rounds: int, fleet_size: int, cohort: int, *, most: int) -> None:
    require_count("rounds", rounds, low=1)
    require_count("fleet_size", fleet_size, low=1, fix=_NO_DEVICES)
    require_count("fleet.cohort", cohort, low=1, high=most, fix="lower fleet.cohort or add devices")


def _require_population(population: int, expected_cohort: int) -> None:
    require_count("privacy.population", population, low=1)
    fix = "raise privacy.population"
    require_count("privacy.expected_cohort", expected_cohort, low=1, high=population, fix=fix)


def _largest_cohort(capacity: int) -> int:
    """Return the expected cohort whose realised size exceeds `capacity` with probability below 1e-20."""
    return math.floor(capacity - 10 * math.sqrt(capacity))


def _scaled(vector: IntVector, factor: float) -> FloatVector:
    """Return `vector * factor` (P,) as fp32, computed in fp64 without a second full-size array."""
    result = np.empty(vector.size, np.float32)
    for start in range(0, vector.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        np.multiply(vector[part], factor, out=result[part], dtype=np.float64, casting="unsafe")
    return result
