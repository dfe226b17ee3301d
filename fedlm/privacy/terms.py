"""The public numbers of a privacy plan: what is stored, accounted and stated."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from fedlm.errors import DataError
from fedlm.privacy.adaptation import Adaptation
from fedlm.privacy.mechanisms import from_fields
from fedlm.privacy.mechanisms.base import Mechanism, Participation

_PLAIN: dict[str, type] = {
    "enabled": bool,
    "noise_multiplier": float,
    "epsilon_target": float,
    "rounds": int,
    "delta": float,
    "population": int,
    "expected_cohort": int,
    "fleet_size": int,
    "cohort": int,
    "reproducible_noise": bool,
}


@dataclass(frozen=True)
class PrivacyTerms:
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
        mechanism: Correlation and accounting, of the accounted fleet.
        adaptation: Clip norm, allocation, further queries.
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
    mechanism: Mechanism
    adaptation: Adaptation

    def to_json(self) -> str:
        """Return these numbers as text, to be stored with a run; no infinities and no seed in it."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        nested = {"mechanism": self.mechanism.to_fields(), "adaptation": self.adaptation.to_fields()}
        return json.dumps(values | nested, indent=1, allow_nan=False)

    @staticmethod
    def parse(text: str) -> dict[str, Any]:
        """Return the fields that `to_json` stored, with their types checked.

        Raises:
            DataError: Not such a text.
        """
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise DataError(f"stored privacy plan is not JSON ({error}); restore the run folder") from error
        wanted = PrivacyTerms.__dataclass_fields__.keys()
        if not isinstance(fields, dict) or fields.keys() != wanted:
            found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
            raise DataError(f"stored privacy plan has {found}; it is of another version of fedlm")
        for name, kind in (*_PLAIN.items(), ("mechanism", dict), ("adaptation", dict)):
            if type(fields[name]) is not kind:
                raise DataError(f"stored privacy plan has {name} = {fields[name]!r}, must be of type {kind.__name__}")
        mechanism, adaptation = from_fields(fields["mechanism"]), Adaptation.from_fields(fields["adaptation"])
        return fields | {"mechanism": mechanism, "adaptation": adaptation}

    @property
    def clip_norm(self) -> float:
        """C of the first round; infinity when not enabled."""
        return self.adaptation.clip_norm if self.enabled else math.inf

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
        """Return `epsilon` for the participation that a ledger saw (`fedlm.privacy.cohorts.ParticipationLedger`).

        Infinite where no such figure would be true: without noise or with noise that repeats, and for a fleet that
        mimics another, whose participation is not that of the fleet accounted for.
        """
        if not self.enabled or self.reproducible_noise or self.mimics:
            return math.inf
        return self.mechanism.realised_epsilon(
            noise_multiplier=self.noise_multiplier,
            num_releases=num_releases,
            delta=self.delta,
            separation=separation,
            max_participations=max_participations,
        )

    def epsilon_of_this_fleet(self, num_releases: int) -> float:
        """Return what the simulated fleet really got: its own sampling, its own noise; infinity if that repeats."""
        if not self.enabled or self.reproducible_noise:
            return math.inf
        real = from_fields(self.mechanism.to_fields() | {"participation": asdict(self.fleet_rule)})
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
        if not self.enabled or self.adaptation.allocation != "published":
            return None
        nominal = self.noise_multiplier / self.adaptation.noise_floor
        return self.mechanism.epsilon(noise_multiplier=nominal, num_releases=self.rounds, delta=self.delta)
