"""Independent Gaussian noise in every round: DP-FedAvg (McMahan, Ramage, Talwar, Zhang, "Learning differentially
private recurrent language models", 2018, https://arxiv.org/abs/1710.06963).

    release_t = x_t + z Z_t,    C = identity

What it costs is decided by the sampler. Poisson: T-fold Poisson-sampled Gaussian; truncated Poisson: the same with
what a cap on the cohort adds (`fedlm.privacy.accounting.subsampled_gaussian`). Fixed-size and separated cohorts: no
amplification, k-fold Gaussian.

Exact: the unsampled law. From above: the sampled ones. A device sends nothing for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from fedlm.codec import coded
from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.privacy.mechanisms.base import Floats, Participation, RoundNoise
from fedlm.privacy.mechanisms.participations import ADD_OR_REMOVE, ZERO_OUT, check, most_participations, sampling_clause
from fedlm.privacy.mechanisms.streaming import IndependentNoise
from fedlm.privacy.mechanisms.unsampled import Unsampled
from fedlm.ranges import require_count


@coded
@dataclass(frozen=True)
class Gaussian(Unsampled):
    """Independent noise; see the module.

    Arguments:
        participation: Sampler "poisson", "truncated_poisson", "fixed" or "separated".

    Guarantee:
        Add or remove one user for the Poisson samplers, for those who do not know the cohorts; zero-out for the others.

    Edge cases:
        Realised participation changes nothing where sampling amplifies: who came how often is itself secret there.
    """

    participation: Participation

    name: ClassVar[str] = "gaussian"
    samplers: ClassVar[tuple[str, ...]] = ("poisson", "truncated_poisson", "fixed", "separated")
    summary: ClassVar[str] = "Gaussian noise, independent in every round"

    def __post_init__(self) -> None:
        """Check the participation rule."""
        check(self.participation, self.name, self.samplers)

    @property
    def amplified(self) -> bool:
        """Whether the accounting rests on secret Poisson cohorts."""
        return self.participation.sampler in ("poisson", "truncated_poisson")

    @property
    def adjacency(self) -> str:
        """As the sampler has it."""
        return ADD_OR_REMOVE if self.amplified else ZERO_OUT

    @property
    def description(self) -> str:
        """Sampling and noise in words."""
        times = f" (sensitivity {self.sensitivity(self.participation.rounds):.4g})"
        clause = f"{sampling_clause(self.participation)}, Gaussian mechanism with independent noise"
        return clause + ("" if self.amplified else times)

    def sensitivity(self, num_releases: int, *, separation: int = 0, max_participations: int = 0) -> float:
        """Return the square root of the number of rounds that one user can be in; without amplification."""
        return math.sqrt(most_participations(self.participation, num_releases, separation, max_participations))

    def epsilon(self, *, noise_multiplier: float, num_releases: int, delta: float) -> float:
        """Return epsilon after the first `num_releases` of T rounds."""
        if not self.amplified:
            return super().epsilon(noise_multiplier=noise_multiplier, num_releases=num_releases, delta=delta)
        require_count("num_releases", num_releases, high=self.participation.rounds)
        if self.participation.sampler == "truncated_poisson":
            return subsampled_gaussian.truncated_epsilon(
                **self._truncated, noise_multiplier=noise_multiplier, rounds=num_releases, delta=delta
            )
        q = self.participation.sampling_probability
        return subsampled_gaussian.epsilon(
            sampling_probability=q, noise_multiplier=noise_multiplier, rounds=num_releases, delta=delta
        )

    def noise_multiplier(self, *, epsilon: float, delta: float) -> float:
        """Return the smallest z whose T releases cost at most `epsilon`."""
        if not self.amplified:
            return super().noise_multiplier(epsilon=epsilon, delta=delta)
        rounds = self.participation.rounds
        if self.participation.sampler == "truncated_poisson":
            return subsampled_gaussian.truncated_noise_multiplier(
                **self._truncated, rounds=rounds, epsilon=epsilon, delta=delta
            )
        q = self.participation.sampling_probability
        return subsampled_gaussian.noise_multiplier(sampling_probability=q, rounds=rounds, epsilon=epsilon, delta=delta)

    def realised_epsilon(
        self, *, noise_multiplier: float, num_releases: int, delta: float, separation: int, max_participations: int
    ) -> float:
        """Return epsilon for what the ledger saw; the planned one where sampling amplifies."""
        if self.amplified:
            return self.epsilon(noise_multiplier=noise_multiplier, num_releases=num_releases, delta=delta)
        return super().realised_epsilon(
            noise_multiplier=noise_multiplier,
            num_releases=num_releases,
            delta=delta,
            separation=separation,
            max_participations=max_participations,
        )

    def with_known_cohorts(self) -> Gaussian:
        """Return the mechanism whose users are each in every round, as far as anybody promises."""
        if not self.amplified:
            return self
        return replace(self, participation=replace(self.participation, sampler="fixed", cap=0))

    def prefix_rmse(self) -> float:
        """Return sqrt((T + 1) / 2): the t-th prefix sum has variance t."""
        return math.sqrt((self.participation.rounds + 1) / 2)

    def round_growth(self) -> Floats:
        """Return ones (T,)."""
        return np.ones(self.participation.rounds)

    def new_noise(self, size: int) -> RoundNoise:
        """Return noise without memory."""
        return IndependentNoise()

    @property
    def _truncated(self) -> dict[str, int]:
        rule = self.participation
        return {"population": rule.population, "cohort": rule.cohort, "cap": rule.cap}
