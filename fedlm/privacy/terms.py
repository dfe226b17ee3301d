"""The public numbers of a privacy plan: what is stored, accounted and stated."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from fedlm.errors import DataError
from fedlm.privacy import accounting


@dataclass(frozen=True)
class PrivacyTerms:
    """The public numbers of a plan, as they are stored.

    Arguments:
        enabled: False: neither clip nor noise.
        clip_norm: C; infinity when not enabled.
        noise_multiplier: z; 0 when not enabled.
        epsilon_target: The budget at `delta`; 0 when only the noise multiplier was given.
        rounds: T, the releases that are paid for.
        delta: Of the guarantee.
        population, expected_cohort: As accounted.
        fleet_size, cohort: As simulated.
        reproducible_noise: The noise follows from the seed.
        mechanism: "gaussian".
    """

    enabled: bool
    clip_norm: float
    noise_multiplier: float
    epsilon_target: float
    rounds: int
    delta: float
    population: int
    expected_cohort: int
    fleet_size: int
    cohort: int
    reproducible_noise: bool
    mechanism: str

    def to_json(self) -> str:
        """Return these numbers as text, to be stored with a run; no infinities and no seed in it."""
        values = {name: getattr(self, name) for name in PrivacyTerms.__dataclass_fields__}
        return json.dumps(values | {"clip_norm": self.clip_norm if self.enabled else None}, indent=1)

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
        if not isinstance(fields, dict) or fields.keys() != PrivacyTerms.__dataclass_fields__.keys():
            found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
            raise DataError(f"stored privacy plan has {found}; it is of another version of fedlm")
        if fields["clip_norm"] is None:
            fields["clip_norm"] = math.inf
        for name, kind in PrivacyTerms.__annotations__.items():
            if type(fields[name]).__name__ != kind:
                raise DataError(f"stored privacy plan has {name} = {fields[name]!r}, must be of type {kind}")
        return fields

    @property
    def sampling_probability(self) -> float:
        """q of the accounted population."""
        return self.expected_cohort / self.population

    @property
    def mimics(self) -> bool:
        """Whether noise and accounting are those of another fleet than the simulated one."""
        return self.enabled and (self.population, self.expected_cohort) != (self.fleet_size, self.cohort)

    def epsilon(self, num_releases: int) -> float:
        """Return what `num_releases` releases cost a user of the accounted population."""
        if not self.enabled:
            return math.inf
        return accounting.epsilon(
            sampling_probability=self.sampling_probability,
            noise_multiplier=self.noise_multiplier,
            rounds=num_releases,
            delta=self.delta,
        )

    def epsilon_of_this_fleet(self, num_releases: int) -> float:
        """Return what the simulated fleet really got: its own q, its own noise; infinity if that repeats."""
        if not self.enabled or self.reproducible_noise:
            return math.inf
        return accounting.epsilon(
            sampling_probability=self.cohort / self.fleet_size,
            noise_multiplier=self.noise_multiplier * self.cohort / self.expected_cohort,
            rounds=num_releases,
            delta=self.delta,
        )
