"""Banded square root noise (Kalinin and Lampert, "Banded square root matrix factorization for differentially private
model training", 2024, https://arxiv.org/abs/2405.13763) with cyclic Poisson sampling (Choquette-Choo et al.,
"(Amplified) banded matrix factorization", 2023, https://arxiv.org/abs/2306.08153).

    C = first b bands of the square root of the all-ones triangle,  c_i = binomial(2 i, i) / 4^i for i < b
    release_t = x_t + z Y_t,    Y_t = Z_t - sum_(0 < i < b) c_i Y_(t-i)

A round's noise needs the last b - 1 rounds' Y. With users in b classes that come in turn, the columns of C of one
user's rounds do not overlap, so all releases are ceil(T / b) Poisson-sampled Gaussians with q = b n / N and multiplier
z / |c|. One band is Poisson DP-FedAvg. Without amplification ("separated") the sensitivity is sqrt(k) |c|.

Exact: sensitivity, and noise. From above: the sampled Gaussian, and the last columns of C, which are shorter. A device
sends nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import ClassVar

import numpy as np

from fedlm.codec import coded
from fedlm.config.built_in_options import BandedOptions
from fedlm.errors import ConfigError
from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.privacy.mechanisms import toeplitz
from fedlm.privacy.mechanisms.base import Floats, Participation, Request, RoundNoise
from fedlm.privacy.mechanisms.participations import ADD_OR_REMOVE, ZERO_OUT, check, most_participations, sampling_clause
from fedlm.privacy.mechanisms.streaming import StreamedNoise
from fedlm.privacy.mechanisms.unsampled import Unsampled
from fedlm.privacy.noise.lattice import NoiseStream
from fedlm.ranges import require_count, require_number


@coded
@dataclass(frozen=True)
class Banded(Unsampled):
    """Banded square root noise; see the module.

    Arguments:
        participation: Sampler "cyclic_poisson" (separation: the number of classes) or "separated".
        bands: b, at most the separation.

    Guarantee:
        Cyclic Poisson: add or remove one user, for those who do not know the cohorts. Separated: zero-out.

    Edge cases:
        Cyclic cohorts that broke the separation are accounted without amplification, by what the ledger saw.
    """

    participation: Participation
    bands: int

    name: ClassVar[str] = "banded"
    keeps_noise: ClassVar[bool] = True
    samplers: ClassVar[tuple[str, ...]] = ("cyclic_poisson", "separated")
    Options: ClassVar[type] = BandedOptions
    summary: ClassVar[str] = "noise correlated over the rounds (banded square root)"

    def __post_init__(self) -> None:
        """Check the participation rule and that no two columns of one user overlap."""
        check(self.participation, self.name, self.samplers)
        fix = "a user's rounds must be at least as far apart: raise privacy.min_separation"
        require_count("privacy.options.bands", self.bands, low=1, high=self.participation.separation, fix=fix)

    @classmethod
    def planned(cls, participation: Participation, request: Request) -> Banded:
        """Return the mechanism with the bands asked for, or with the best number of them."""
        classes_open = participation.sampler == "cyclic_poisson" and participation.separation == 1
        if bands := request.options.bands:
            return cls(replace(participation, separation=bands) if classes_open else participation, bands)
        if classes_open and request.noise_multiplier and not request.epsilon:
            raise ConfigError(
                f"privacy.options.bands = 0 with privacy.noise_multiplier = {request.noise_multiplier}: the best is "
                "that for an epsilon; set privacy.options.bands, or privacy.epsilon in place of the noise multiplier"
            )
        if classes_open:
            require_number("privacy.epsilon", request.epsilon, above=0)
        return best_band(participation, epsilon=request.epsilon, delta=request.delta, max_bands=request.most_apart)

    @property
    def num_vectors(self) -> int:  # type: ignore[override]
        """One less than there are bands."""
        return self.bands - 1

    @property
    def parameters(self) -> str:  # type: ignore[override]
        """The bands in words."""
        return f"{self.bands} bands"

    @property
    def amplified(self) -> bool:
        """Whether the accounting rests on secret Poisson cohorts."""
        return self.participation.sampler == "cyclic_poisson"

    @property
    def adjacency(self) -> str:
        """As the sampler has it."""
        return ADD_OR_REMOVE if self.amplified else ZERO_OUT

    @property
    def description(self) -> str:
        """Sampling, matrix and sensitivity in words."""
        rounds, moved = self.participation.rounds, self.sensitivity(self.participation.rounds)
        clause = f"{sampling_clause(self.participation)}, banded square root noise with {self.bands} bands "
        if self.amplified:
            times = self._sampled_rounds(rounds)
            return clause + f"(column norm {self._column_norm(rounds):.4g}, {times:,} sampled rounds of a user)"
        return clause + f"(sensitivity {moved:.4g}, no amplification)"

    @cached_property
    def column(self) -> Floats:
        """First column of C (T,)."""
        column = np.zeros(self.participation.rounds)
        column[: self.bands] = toeplitz.square_root_column(self.bands)
        return column

    def sensitivity(self, num_releases: int, *, separation: int = 0, max_participations: int = 0) -> float:
        """Return the exact L2 sensitivity of the first `num_releases` rounds, without amplification."""
        times = most_participations(self.participation, num_releases, separation, max_participations)
        apart = separation or self.participation.separation
        return toeplitz.sensitivity(self.column[:num_releases], separation=apart, participations=times)

    def epsilon(self, *, noise_multiplier: float, num_releases: int, delta: float) -> float:
        """Return epsilon after the first `num_releases` of T rounds."""
        if not self.amplified:
            return super().epsilon(noise_multiplier=noise_multiplier, num_releases=num_releases, delta=delta)
        z, releases = self._checked(noise_multiplier, num_releases)
        if not releases:
            return 0.0
        return subsampled_gaussian.epsilon(
            sampling_probability=self.participation.sampling_probability,
            noise_multiplier=z / self._column_norm(releases),
            rounds=self._sampled_rounds(releases),
            delta=delta,
        )

    def noise_multiplier(self, *, epsilon: float, delta: float) -> float:
        """Return the smallest z whose T releases cost at most `epsilon`."""
        if not self.amplified:
            return super().noise_multiplier(epsilon=epsilon, delta=delta)
        rounds = self.participation.rounds
        one_round = subsampled_gaussian.noise_multiplier(
            sampling_probability=self.participation.sampling_probability,
            rounds=self._sampled_rounds(rounds),
            epsilon=epsilon,
            delta=delta,
        )
        # The product and the quotient of `epsilon` may round; the accountant stays 0.01 % below its target anyway.
        return one_round * self._column_norm(rounds) * (1 + 1e-12)

    def realised_epsilon(
        self, *, noise_multiplier: float, num_releases: int, delta: float, separation: int, max_participations: int
    ) -> float:
        """Return epsilon for what the ledger saw; the planned one where sampling amplifies and classes were kept."""
        if self.amplified and (separation >= self.participation.separation or max_participations < 2):
            return self.epsilon(noise_multiplier=noise_multiplier, num_releases=num_releases, delta=delta)
        return super().realised_epsilon(
            noise_multiplier=noise_multiplier,
            num_releases=num_releases,
            delta=delta,
            separation=separation,
            max_participations=max_participations,
        )

    def with_known_cohorts(self) -> Banded:
        """Return the mechanism whose users are each in every round of their class, as far as anybody promises."""
        if not self.amplified:
            return self
        return replace(self, participation=replace(self.participation, sampler="separated", max_participations=0))

    def prefix_rmse(self) -> float:
        """Return the root mean square noise of prefix sums for z = 1."""
        return toeplitz.prefix_rmse(toeplitz.inverse_column(self.column[: self.bands], self.participation.rounds))

    def round_growth(self) -> Floats:
        """Return the norms of the rows of C^-1 (T,)."""
        return np.sqrt(np.cumsum(toeplitz.inverse_column(self.column, self.participation.rounds) ** 2))

    def new_noise(self, size: int) -> RoundNoise:
        """Return the noise of a run, with b - 1 vectors of `size` fp64 numbers."""
        inverse = toeplitz.inverse_column(self.column[: self.bands], self.participation.rounds)
        return BandedNoise(size, self.column[: self.bands], gain=float(np.abs(inverse).sum()))

    def _column_norm(self, num_releases: int) -> float:
        return float(np.linalg.norm(self.column[:num_releases]))

    def _sampled_rounds(self, num_releases: int) -> int:
        return -(-num_releases // self.participation.separation)


class BandedNoise(StreamedNoise):
    """C^-1 Z row by row, from the last b - 1 rows.

    Arguments:
        size: P.
        column: (b,) of C.
        gain: Largest L1 norm of a row of C^-1.
    """

    def __init__(self, size: int, column: Floats, gain: float) -> None:
        super().__init__(size, gain)
        self._column = column
        self._rows = np.zeros((len(column) - 1, size))  # (b - 1, P), the row of round t at t mod (b - 1)

    @property
    def num_bytes(self) -> int:
        """8 (b - 1) P."""
        return self._rows.nbytes

    def _step(self, part: slice, stream: NoiseStream) -> Floats:
        noise = np.empty(part.stop - part.start)
        stream.normals(noise)
        scratch, num_rows = np.empty_like(noise), len(self._rows)
        # One after the other and not as a matrix product, whose last bits depend on the number of threads.
        for back in range(1, min(num_rows, self._round - 1) + 1):
            noise -= np.multiply(self._rows[(self._round - back) % num_rows, part], self._column[back], out=scratch)
        if num_rows:
            self._rows[self._round % num_rows, part] = noise
        return noise


def best_band(participation: Participation, *, epsilon: float, delta: float, max_bands: int = 0) -> Banded:
    """Return the banded mechanism with the least prefix RMSE at a given epsilon.

    Arguments:
        participation: Sampler "cyclic_poisson", where separation 1 leaves the number of classes open and they become as
            many as the bands, else it is their number; or "separated".
        epsilon: The target; 0 will do where sampling does not amplify or the classes are given.
        delta: Of the guarantee.
        max_bands: The most to choose from, for noise takes as many vectors of memory; 0: no limit.

    Returns:
        With a power of two of bands or the most that are possible; each comparison calibrates the noise, which takes
        about a second where sampling amplifies.
    """
    check(participation, Banded.name, Banded.samplers)
    limit = require_count("largest number of bands", max_bands) or participation.rounds
    if participation.sampler == "cyclic_poisson" and participation.separation == 1:
        most = min(participation.population // participation.cohort, participation.rounds, limit)
        made = {bands: Banded(replace(participation, separation=bands), bands) for bands in _candidates(most)}
        return _least(made, lambda plan: plan.noise_multiplier(epsilon=epsilon, delta=delta) * plan.prefix_rmse())
    made = {bands: Banded(participation, bands) for bands in _candidates(min(participation.separation, limit))}
    if participation.sampler == "cyclic_poisson":
        # The sampling is the same for all of these, hence also the noise in units of the column's norm.
        return _least(made, lambda plan: plan._column_norm(participation.rounds) * plan.prefix_rmse())
    return _least(made, lambda plan: plan.sensitivity(participation.rounds) * plan.prefix_rmse())


def _candidates(most: int) -> list[int]:
    """Return powers of two and `most`: the loss is flat in between."""
    return [2**power for power in range(most.bit_length()) if 2 ** (power + 1) <= most] + [most]


def _least(made: dict[int, Banded], loss: Callable[[Banded], float]) -> Banded:
    """Return the plan of least loss by bisection: the loss first falls and then rises with the number of bands.

    The largest number is always tried, for ceil(T / b) makes steps that may hide it.
    """
    plans = [made[bands] for bands in sorted(made)]
    of = cache(lambda place: loss(plans[place]))
    low, high = 0, len(plans) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if of(middle) <= of(middle + 1) else (middle + 1, high)
    return plans[min(low, len(plans) - 1, key=of)]
