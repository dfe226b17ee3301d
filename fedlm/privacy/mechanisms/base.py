"""What a mechanism is: how the noise of T rounds is correlated, and what its releases cost.

Every mechanism releases `x_t + (C^-1 Z)_t` for t = 1..T (the matrix mechanism; Denisov et al. 2022, 2202.08312): x_t
(P,) is the round's sum of clipped updates in units of the clip norm, Z (T, P) is iid N(0, z^2), and C (T, T) is lower
triangular with ones on its diagonal. C is the identity for independent noise.

A mechanism is frozen and made of public numbers alone. It knows neither seed, clip norm nor data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from fedlm.codec import coded, union
from fedlm.privacy.noise import NoiseStream

Floats = npt.NDArray[np.float64]


@coded
@dataclass(frozen=True)
class Participation:
    """Who can be in which cohort: what the sampler does and the accountant assumes.

    Arguments:
        sampler: "poisson", "truncated_poisson", "fixed", "cyclic_poisson" or "separated" (`fedlm.privacy.cohorts`).
        population: N, users that can be sampled.
        cohort: n, expected devices a round.
        rounds: T.
        cap: Largest cohort of "truncated_poisson"; 0 for other samplers.
        separation: b, a user takes part at most once in any b consecutive rounds; 1: no such rule. "cyclic_poisson"
            splits the users into b classes, of which round t takes class t mod b.
        max_participations: k, most rounds of one user; `rounds` when nothing limits it.
    """

    sampler: str
    population: int
    cohort: int
    rounds: int
    cap: int = 0
    separation: int = 1
    max_participations: int = 0

    @property
    def sampling_probability(self) -> float:
        """q of a round in which a user can be sampled at all."""
        return min(1.0, self.cohort * self._classes / self.population)

    @property
    def _classes(self) -> int:
        return self.separation if self.sampler == "cyclic_poisson" else 1


class RoundNoise(Protocol):
    """The noise of consecutive rounds over one vector; holds what later rounds need of earlier draws, and nothing else.

    Calls are for rounds 1, 2, 3, ... in this order, each by exactly one of the two methods.
    """

    def add_to(self, total: npt.NDArray[np.int64], std: float, stream: NoiseStream) -> None:
        """Add `std * (C^-1 Z)_t` to the sum of the round in place, on the integer lattice; Z_t ~ N(0, 1) from `stream`.

        Arguments:
            total: (P,) int64.
            std: Standard deviation of a coordinate of Z in units of `total`; the same in every round.
            stream: The round's own.
        """
        ...

    def replay(self, stream: NoiseStream) -> None:
        """Take in the draw of a round that was released before a restart, from the same key as then."""
        ...


@union
class Mechanism(ABC):
    """Correlation, sensitivity and accounting of T releases; subclasses are frozen dataclasses of public numbers.

    Guarantee:
        `epsilon` is that of `num_releases` releases with noise multiplier z under `participation`, never less than the
        true one; adjacency as in `adjacency`.
    """

    name: ClassVar[str]
    keeps_noise: ClassVar[bool] = False
    """Whether a round's noise depends on earlier draws, so that their keys have to outlive a restart."""

    participation: Participation
    """What sampling and ledger have to guarantee."""

    @property
    @abstractmethod
    def adjacency(self) -> str:
        """ "add or remove one user" where sampling amplifies; "one user's contributions replaced by zero" elsewhere."""

    @property
    @abstractmethod
    def description(self) -> str:
        """A clause for the privacy statement: sampler, matrix and sensitivity with every figure they rest on."""

    @abstractmethod
    def epsilon(self, *, noise_multiplier: float, num_releases: int, delta: float) -> float:
        """Return epsilon after the first `num_releases` of T rounds."""

    @abstractmethod
    def noise_multiplier(self, *, epsilon: float, delta: float) -> float:
        """Return the smallest z whose T releases cost at most `epsilon`."""

    def with_known_cohorts(self) -> Mechanism:
        """Return the same noise, accounted for an analyst who knows who is in which cohort: nothing amplifies.

        The mechanism itself where its accounting assumes no secret sampling.
        """
        return self

    @abstractmethod
    def prefix_rmse(self) -> float:
        """Return the root mean square, over t = 1..T, of the noise in one coordinate of the prefix sums, for z = 1."""

    @abstractmethod
    def new_noise(self, size: int) -> RoundNoise:
        """Return the noise of a run over vectors of `size` coordinates, before round 1."""

    def noise_growth(self, num_reports: float) -> float:
        """Return what multiplies the noise of a sum over so many devices: 1 but where every device adds its own."""
        return 1.0

    @abstractmethod
    def realised_epsilon(
        self, *, noise_multiplier: float, num_releases: int, delta: float, separation: int, max_participations: int
    ) -> float:
        """Return epsilon for what the ledger saw.

        Arguments:
            noise_multiplier, num_releases, delta: As for `epsilon`.
            separation: The least distance in rounds between two participations of any user; T if nobody came twice.
            max_participations: The most rounds that any user was in.
        """
