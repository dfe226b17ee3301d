"""The public numbers of a privacy plan: what is stored, accounted and stated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from fedlm.codec import coded, to_text
from fedlm.privacy.adaptive.rule import AdaptiveRule
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.clipping.side_queries import SideQuery
from fedlm.privacy.mechanisms.base import Mechanism, Participation


@coded
@dataclass(frozen=True)
class PlanParameters:
    """The public numbers of a plan, as they are stored.

    Arguments:
        enabled: False: neither clip nor noise.
        noise_multiplier: z; 0 when not enabled.
        epsilon_target: The budget at `delta`; 0 when only the noise multiplier was given.
        rounds: T, the releases that are paid for.
        delta: Of the guarantee.
        population, expected_cohort: As accounted.
        fleet_size, cohort: As simulated.
        reproducible_noise: The noise follows from the seed.
        reproducible_cohorts: The cohorts follow from the seed.
        mechanism: Correlation and accounting, of the accounted fleet.
        adaptive_rule: Clip norm, allocation, further queries.
    """

    enabled: bool
    noise_multiplier: float
    epsilon_target: float
    rounds: int
    delta: float
    population: int
    expected_cohort: int
    fleet_size: int
    cohort: int
    reproducible_noise: bool
    reproducible_cohorts: bool
    mechanism: Mechanism
    adaptive_rule: AdaptiveRule

    def to_json(self) -> str:
        """Return these numbers as text, to be stored with a run; no infinities and no secret in it."""
        return to_text(self, PlanParameters, indent=1)

    def noise_std(self, clip_spec: ClipSpec, num_reports: float | None = None) -> float:
        """Return the standard deviation of a coordinate of the mean in a group of scale 1; 0 when not enabled.

        Arguments:
            clip_spec: Of the round.
            num_reports: Devices that reported, of the accounted cohort; None: as many as are expected.
        """
        return self.query_std(clip_spec.clip_norm, clip_spec.update_share, num_reports)

    def answer_std(self, side_query: SideQuery, num_reports: float | None = None) -> float:
        """Return the standard deviation of a coordinate of a side query's released answer, in its own units."""
        return self.query_std(side_query.bound, side_query.share, num_reports)

    def query_std(self, bound: float, share: float, num_reports: float | None = None) -> float:
        """Return the noise of a mean over the expected cohort, of queries with this bound and share of the clip norm.

        z C / n is the noise of the whole vector's mean; a query that gets the share a of C and is bounded by b is
        scaled by a C / b before the clip, and back afterwards.
        """
        if not self.enabled:
            return 0.0
        growth = self.mechanism.noise_growth(self.expected_cohort if num_reports is None else num_reports)
        return self.noise_multiplier * growth / (self.expected_cohort * share) * bound

    @property
    def clip_norm(self) -> float:
        """C of the first round; infinity when not enabled."""
        return self.adaptive_rule.clip_norm if self.enabled else math.inf

    @property
    def sampling_probability(self) -> float:
        """q of the accounted population, in a round in which a user can be sampled."""
        return self.mechanism.participation.sampling_probability

    @property
    def accountant(self) -> str:
        """What computes epsilon, as the mechanism has it."""
        return self.mechanism.accountant

    @property
    def cohorts_are_secret(self) -> bool:
        """Whether epsilon rests on nobody knowing who was sampled."""
        return self.mechanism.amplified

    @property
    def mimics(self) -> bool:
        """Whether noise and accounting are those of another fleet than the simulated one."""
        return self.enabled and (self.population, self.expected_cohort) != (self.fleet_size, self.cohort)

    @cached_property
    def fleet_rule(self) -> Participation:
        """The participation rule of the simulated fleet: that of the accounted one, with its own numbers."""
        accounted = self.mechanism.participation
        cap = accounted.cap and max(1, round(accounted.cap * self.cohort / self.expected_cohort))
        return replace(accounted, population=self.fleet_size, cohort=self.cohort, cap=cap)

    def epsilon(self, num_releases: int) -> float:
        """Return what `num_releases` releases cost a user of the accounted population."""
        if not self.enabled:
            return math.inf
        return self.mechanism.epsilon(
            noise_multiplier=self.noise_multiplier, num_releases=num_releases, delta=self.delta
        )

    def realised_epsilon(self, num_releases: int, *, separation: int, max_participations: int) -> float:
        """Return `epsilon` for the participation that a ledger saw
        (`fedlm.privacy.sampling.cohorts.ParticipationLedger`).

        Infinite where no such figure would be true: without noise or with noise that repeats, and for a fleet that
        mimics another, whose participation is not that of the fleet accounted for. Without amplification where the
        cohorts follow from the seed.
        """
        if not self.enabled or self.reproducible_noise or self.mimics:
            return math.inf
        mechanism = self.mechanism.with_known_cohorts() if self.reproducible_cohorts else self.mechanism
        return mechanism.realised_epsilon(
            noise_multiplier=self.noise_multiplier,
            num_releases=num_releases,
            delta=self.delta,
            separation=separation,
            max_participations=max_participations,
        )

    def epsilon_with_known_cohorts(self, num_releases: int) -> float:
        """Return what `num_releases` releases cost a user of whom the analyst knows when it was sampled.

        No amplification, in the most rounds that a user can be in: every round under Poisson sampling. The same as
        `epsilon` for mechanisms that assume no secret sampling.
        """
        if not self.enabled:
            return math.inf
        return self.mechanism.with_known_cohorts().epsilon(
            noise_multiplier=self.noise_multiplier, num_releases=num_releases, delta=self.delta
        )

    def epsilon_of_this_fleet(self, num_releases: int, *, cohorts_known: bool | None = None) -> float:
        """Return what the simulated fleet really got: its own sampling, its own noise; infinity if that repeats.

        Arguments:
            num_releases: Rounds so far.
            cohorts_known: Whether the analyst knows who was sampled; None: who knows the seed is the analyst, so that
                reproducible cohorts are known.
        """
        if not self.enabled or self.reproducible_noise:
            return math.inf
        real: Mechanism = replace(cast(Any, self.mechanism), participation=self.fleet_rule)
        if self.reproducible_cohorts if cohorts_known is None else cohorts_known:
            real = real.with_known_cohorts()
        noise = self.noise_multiplier * self.cohort / self.expected_cohort
        return real.epsilon(noise_multiplier=noise, num_releases=num_releases, delta=self.delta)

    @property
    def epsilon_server(self) -> float | None:
        """Against a server under secure aggregation (`Mechanism.epsilon_server`); None where it is trusted."""
        if not self.enabled or self.mechanism.trusts_server:
            return None
        if self.reproducible_noise:
            return math.inf
        z = self.noise_multiplier
        return self.mechanism.epsilon_server(noise_multiplier=z, num_releases=self.rounds, delta=self.delta)

    @property
    def epsilon_as_published(self) -> float | None:
        """What the form of noise allocation as published would have claimed; None for every sound form."""
        if not self.enabled or self.adaptive_rule.allocation != "published":
            return None
        nominal = self.noise_multiplier / self.adaptive_rule.noise_floor
        return self.mechanism.epsilon(noise_multiplier=nominal, num_releases=self.rounds, delta=self.delta)
