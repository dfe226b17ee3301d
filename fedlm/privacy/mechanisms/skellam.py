"""Distributed Skellam noise as a mechanism (Agarwal, Kairouz and Liu 2021, https://arxiv.org/abs/2110.04995).

    release_t = sum over devices of (rounded update + Skellam(mu / D)) + Skellam(mu (1 - reports / D)),   C = identity

The noise is the devices' own: `fedlm.privacy.noise.skellam_encoding` is what they encode with, and the sum is only ever
seen with at least as much noise as its devices brought. This file says who can be in a cohort and what the releases
cost: the analyst, who sees them alone, and the server, which knows the cohorts and sees the sums before the last term
is added.

From above: everything, by Renyi divergences (`fedlm.privacy.accounting.rdp`). A device sends m bits for each padded
coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, NoReturn

from fedlm.codec import coded
from fedlm.config.built_in_options import SkellamOptions
from fedlm.errors import ConfigError
from fedlm.privacy.accounting import rdp
from fedlm.privacy.mechanisms.base import Mechanism, Participation, Request
from fedlm.privacy.mechanisms.gaussian import Gaussian
from fedlm.privacy.mechanisms.participations import ADD_OR_REMOVE, ZERO_OUT, check, most_participations, sampling_clause
from fedlm.privacy.noise.skellam_encoding import Skellam, largest_cohort, least_noise
from fedlm.ranges import require_count, require_number
from fedlm.rounding import rounded_up


@coded
@dataclass(frozen=True)
class DistributedSkellam(Mechanism):
    """Independent noise that the devices add; see the module.

    Arguments:
        participation: Sampler "poisson", "fixed" or "separated".
        size: The most coordinates of any round, answers to side queries included: longer vectors round to longer ones.
        grid_bits: g, the clip norm is 2^g steps.
        min_survivors: Least devices whose sum the server gets to see, for its figure alone.
        max_devices: D, among which the noise is shared out; larger cohorts are cut.

    Guarantee:
        `epsilon` is the analyst's: add or remove one user under Poisson sampling, zero-out for other samplers.
        `epsilon_server` is that of a server that follows the protocol and gets nothing but sums of `min_survivors`
        encodings or more: zero-out, no amplification.

    Edge cases:
        A transport that shows the server single encodings, or sums of a few, gives no guarantee against it.
    """

    participation: Participation
    size: int
    grid_bits: int
    min_survivors: int
    max_devices: int

    name: ClassVar[str] = "skellam"
    samplers: ClassVar[tuple[str, ...]] = ("poisson", "fixed", "separated")
    Options: ClassVar[type] = SkellamOptions
    summary: ClassVar[str] = "Skellam noise that the devices add inside a secure sum"
    supports_mimicry: ClassVar[bool] = False
    wants_size: ClassVar[bool] = True
    trusts_server: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the participation rule and the sizes."""
        check(self.participation, self.name, self.samplers)
        rule = self.participation
        require_count("size", self.size, low=1, fix="it is the number of coordinates of a round")
        require_count("privacy.options.grid_bits", self.grid_bits, low=4, high=18)
        require_count("max_devices", self.max_devices, low=rule.cohort, high=rule.population)
        fix = "a larger sum would be rare"
        require_count("privacy.options.min_survivors", self.min_survivors, low=1, high=rule.cohort, fix=fix)

    @classmethod
    def planned(cls, participation: Participation, request: Request) -> DistributedSkellam:
        """Return the mechanism with room for the largest cohort; a billionth of delta is for larger ones."""
        check(participation, cls.name, cls.samplers)
        population, cohort = participation.population, participation.cohort
        if participation.sampler == "poisson":
            rounds = participation.rounds
            most = largest_cohort(population=population, cohort=cohort, rounds=rounds, delta=request.delta)
        elif participation.sampler == "separated":
            most = -(-population // (population // cohort))  # the longest of the slots
        else:
            most = cohort
        options = request.options
        survivors = options.min_survivors or default_survivors(cohort)
        return cls(participation, request.size, options.grid_bits, survivors, most)

    @property
    def amplified(self) -> bool:
        """Whether the analyst's figure rests on secret Poisson cohorts."""
        return self.participation.sampler == "poisson"

    @property
    def accountant(self) -> str:
        """Renyi divergences."""
        return "rdp"

    @property
    def largest_cohort(self) -> int:  # type: ignore[override]
        """D: the noise is shared out among so many; that a cohort is larger has a part of delta."""
        return self.max_devices

    @property
    def adjacency(self) -> str:
        """The analyst's, as the sampler has it."""
        return ADD_OR_REMOVE if self.amplified else ZERO_OUT

    @property
    def description(self) -> str:
        """Sampling and noise in words."""
        return (
            f"{sampling_clause(self.participation)}, Skellam noise added by the devices, each a part in "
            f"{self.max_devices:,}, on a grid of 2^{self.grid_bits} steps a clip norm, for at most {self.size:,} "
            "coordinates"
        )

    def design(self, noise_multiplier: float, *, delta: float, size: int = 0) -> Skellam:
        """Return what devices and server encode and decode with.

        Arguments:
            noise_multiplier: z.
            delta: Of the guarantee.
            size: Coordinates of the round; 0: the most.

        Raises:
            ConfigError: More coordinates than are accounted.
        """
        require_count("coordinates of a round", size, high=self.size, fix="plan for the largest round")
        require_number("noise_multiplier", noise_multiplier, above=0, fix="no noise means no privacy")
        rule = self.participation
        return Skellam(
            size=size or self.size,
            population=rule.population,
            cohort=rule.cohort,
            rounds=rule.rounds,
            delta=delta,
            noise_multiplier=float(noise_multiplier),
            grid_bits=self.grid_bits,
            min_survivors=self.min_survivors,
            max_devices=self.max_devices,
            max_participations=most_participations(rule, rule.rounds),
            replace_one=False,
            rotation_seed=0,
        )

    def encoder(self, noise_multiplier: float, *, delta: float, size: int) -> Skellam:
        """Return the design for a round of `size` coordinates."""
        return self.design(noise_multiplier, delta=delta, size=size)

    def server_statement(self, epsilon: float) -> str:
        """Return what a server learns from sums of `min_survivors` encodings or more."""
        times = most_participations(self.participation, self.participation.rounds)
        return (
            f"Against a server that follows the protocol and knows the cohorts, but gets nothing except sums of at "
            f"least {self.min_survivors:,} devices by secure aggregation: epsilon {rounded_up(epsilon)} (adjacency: "
            f"{ZERO_OUT}, in at most {times:,} rounds); a transport that shows it smaller sums gives no guarantee "
            "against it."
        )

    def epsilon(self, *, noise_multiplier: float, num_releases: int, delta: float) -> float:
        """Return the analyst's epsilon after the first `num_releases` of T rounds."""
        times = most_participations(self.participation, num_releases)
        return self._epsilon(noise_multiplier, num_releases, times, delta)

    def noise_multiplier(self, *, epsilon: float, delta: float) -> float:
        """Return the smallest z, up to 0.1 %, whose T releases cost the analyst's `epsilon` at most."""
        rounds = self.participation.rounds

        def fits(z: float) -> bool:
            return self.epsilon(noise_multiplier=z, num_releases=rounds, delta=delta) <= epsilon

        return least_noise(fits, grid_bits=self.grid_bits)

    def realised_epsilon(
        self, *, noise_multiplier: float, num_releases: int, delta: float, separation: int, max_participations: int
    ) -> float:
        """Return the analyst's epsilon for what the ledger saw; the planned one where sampling amplifies."""
        require_count("separation", separation, low=1)
        seen = most_participations(self.participation, num_releases, separation, max_participations)
        return self._epsilon(noise_multiplier, num_releases, seen if max_participations else 0, delta)

    def epsilon_server(self, *, noise_multiplier: float, num_releases: int, delta: float) -> float:
        """Return what the server learns from the first `num_releases` sums; see the guarantee."""
        require_count("num_releases", num_releases, high=self.participation.rounds)
        if not num_releases:
            return 0.0
        times = most_participations(self.participation, num_releases)
        return replace(self.design(noise_multiplier, delta=delta), max_participations=times).epsilon_server

    def with_known_cohorts(self) -> DistributedSkellam:
        """Return the mechanism whose users are each in every round, as far as anybody promises."""
        if not self.amplified:
            return self
        return replace(self, participation=replace(self.participation, sampler="fixed"))

    def prefix_rmse(self) -> float:
        """Return that of Gaussian noise: independent in every round, of the same variance."""
        return Gaussian(self.participation).prefix_rmse()

    def new_noise(self, size: int) -> NoReturn:
        """Refuse: `Skellam.encode` and `decode` draw the noise.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("Skellam noise is the devices' own; release a sum that was made with the plan's clip spec")

    def _epsilon(self, noise_multiplier: float, num_releases: int, times: int, delta: float) -> float:
        design = self.design(noise_multiplier, delta=delta)
        require_count("num_releases", num_releases, high=self.participation.rounds)
        if not num_releases or not times:
            return 0.0
        if self.amplified:
            return _analyst(replace(design, rounds=num_releases, max_participations=1))
        return rdp.epsilon(times * design.curve(design.variance), delta=delta)


def default_survivors(cohort: int) -> int:
    """Return a third of the cohort: fewer come by a freak of sampling or if most devices drop out."""
    return max(1, cohort // 3)


@lru_cache(maxsize=4096)
def _analyst(design: Skellam) -> float:
    return design.epsilon_analyst
