"""What a mechanism is: how the noise of T rounds is correlated, and what its releases cost.

Every mechanism releases `x_t + (C^-1 Z)_t` for t = 1..T (the matrix mechanism; Denisov et al. 2022, 2202.08312): x_t
(P,) is the round's sum of clipped updates in units of the clip norm, Z (T, P) is iid N(0, z^2), and C (T, T) is lower
triangular with ones on its diagonal. C is the identity for independent noise.

A mechanism is frozen and made of public numbers alone. It knows neither seed, clip norm nor data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from fedlm.codec import coded, union
from fedlm.config.schema import Config
from fedlm.privacy.noise.lattice import NoiseStream
from fedlm.registry import COHORT_SAMPLERS, MECHANISMS, ROW_SAMPLERS, NoOptions
from fedlm.rounding import rounded_up

if TYPE_CHECKING:
    from fedlm.privacy.noise.skellam_encoding import Skellam

Floats = npt.NDArray[np.float64]


@coded
@dataclass(frozen=True)
class Participation:
    """Who can be in which cohort: what the sampler does and the accountant assumes.

    Arguments:
        sampler: One of `fedlm.registry.COHORT_SAMPLERS` (`fedlm.privacy.sampling.cohort_samplers`).
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
        classes: int = COHORT_SAMPLERS.resolve(self.sampler).num_classes(self)
        return classes


@dataclass(frozen=True)
class Request:
    """What a mechanism is made for, beside the participation rule.

    Arguments:
        delta, epsilon: The target; epsilon 0: only the noise multiplier is given.
        noise_multiplier: z where epsilon is not given; no matrix depends on it.
        options: The mechanism's `Options`.
        most_apart: Rounds after which a device of a smaller fleet that follows the same rule comes again; 0: none.
        size: The most coordinates of a round; 0: unknown.
    """

    delta: float
    epsilon: float = 0.0
    noise_multiplier: float = 0.0
    options: Any = None
    most_apart: int = 0
    size: int = 0


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


@union(MECHANISMS)
class Mechanism(ABC):
    """Correlation, sensitivity and accounting of T releases; subclasses are frozen dataclasses of public numbers.

    Guarantee:
        `epsilon` is that of `num_releases` releases with noise multiplier z under `participation`, never less than the
        true one; adjacency as in `adjacency`.
    """

    name: ClassVar[str]
    samplers: ClassVar[tuple[str, ...]]
    """Samplers that it can account for, the default first."""
    Options: ClassVar[type] = NoOptions
    """What [privacy.options] may hold: a frozen dataclass whose fields are made with `fedlm.config.schema.option`."""
    summary: ClassVar[str] = ""
    """The noise in words that need no glossary."""
    keeps_noise: ClassVar[bool] = False
    """Whether a round's noise depends on earlier draws, so that their keys have to outlive a restart."""
    supports_mimicry: ClassVar[bool] = True
    """Whether its noise can be that of a larger fleet than the one that is simulated."""
    wants_size: ClassVar[bool] = False
    """Whether it is made for a number of coordinates; then `Request.size` has the most of any round."""
    by_report: ClassVar[bool] = False
    """Whether each device's report is noised by itself, so that the guarantee holds for every single one."""
    trusts_server: ClassVar[bool] = True
    """Whether the server sees sums without noise; else `epsilon_server` tells what it learns."""
    num_vectors: int = 0
    """Vectors of earlier noise that a run keeps."""
    parameters: str = ""
    """What decides `num_vectors`, in words; empty: nothing to choose."""
    largest_cohort: int | None = None
    """Devices that a cohort is cut to; None: the sampler alone decides."""

    participation: Participation
    """What sampling and ledger have to guarantee."""

    @classmethod
    def planned(cls, participation: Participation, request: Request) -> Mechanism:
        """Return the mechanism of a run, its matrix chosen for the participation rule and the request.

        Raises:
            ConfigError: An impossible combination.
        """
        return cls(participation)  # type: ignore[call-arg]

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        """Yield what in a config cannot work with this mechanism, one sentence each."""
        rows = config.trainable.embedding_rows
        if not cls.keeps_noise or not config.privacy.enabled or not rows.count:
            return
        if not ROW_SAMPLERS.resolve(rows.sampler).is_fixed:
            yield (
                f"privacy.mechanism = {config.privacy.mechanism!r} takes noise back in later rounds, which need the "
                f"same rows, but trainable.embedding_rows.sampler = {rows.sampler!r}; set it to 'top_k', or count = 0"
            )

    @property
    def amplified(self) -> bool:
        """Whether the accounting rests on secret cohorts, so that who knows them has no such guarantee."""
        return False

    @property
    def accountant(self) -> str:
        """What computes epsilon: "pld" (privacy loss distributions), "rdp", "gaussian", or other words."""
        return "pld" if self.amplified else "gaussian"

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

    def round_growth(self) -> Floats | None:
        """Return (T,) the standard deviation of a round's noise over that of its own draw; None: not known."""
        return None

    def matrix(self) -> Floats | None:
        """Return C (T, T) for the test kit, which knows those of the built-in mechanisms itself; None: not told."""
        return None

    def encoder(self, noise_multiplier: float, *, delta: float, size: int) -> Skellam | None:
        """Return how a round's devices encode `size` coordinates; None where the server adds the noise."""
        return None

    def epsilon_server(self, *, noise_multiplier: float, num_releases: int, delta: float) -> float:
        """Return what the server learns from the first `num_releases` sums; infinity where it sees them bare."""
        return math.inf

    def server_statement(self, epsilon: float) -> str:
        """Return a sentence on what holds against the server, at an `epsilon_server`; where it is not trusted."""
        return f"Against a server that follows the protocol: epsilon {rounded_up(epsilon)}."

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
