"""Buffered linear Toeplitz noise (McMahan, Xu and Zhang 2024, "A hassle-free algorithm for private learning in
practice: don't use tree aggregation, use BLTs", https://arxiv.org/abs/2408.08868; Dvijotham et al. 2024,
https://arxiv.org/abs/2404.16706).

C is Toeplitz with a rational generating function of degree d, and so is its inverse:

    c(x) = prod_i (1 - zero_i x) / prod_i (1 - pole_i x) = 1 + sum_i w_i x / (1 - pole_i x)
    release_t = x_t + z (Z_t + sum_i v_i S_(i,t)),    S_(i,t+1) = zero_i S_(i,t) + Z_t

so a round's noise needs d buffers S of the size of the model. Poles and zeros interlace, 1 > pole_1 > zero_1 > pole_2
> ... > 0: then all w are positive, the column 1, sum w_i pole_i^(j-1) never increases (w sums to at most pole_1), and
the sensitivity is the exact one of `toeplitz`.

Exact: sensitivity, epsilon, noise. Optimised, hence not unique: poles and zeros, for the least RMSE times sensitivity
under the participation rule. They are stored with a run. A device sends nothing for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from fedlm.codec import coded
from fedlm.config.built_in_options import BltOptions
from fedlm.errors import ConfigError
from fedlm.privacy.mechanisms import toeplitz
from fedlm.privacy.mechanisms.base import Floats, Participation, Request, RoundNoise
from fedlm.privacy.mechanisms.participations import check, most_participations, sampling_clause
from fedlm.privacy.mechanisms.streaming import StreamedNoise
from fedlm.privacy.mechanisms.unsampled import Unsampled
from fedlm.privacy.noise.lattice import NoiseStream
from fedlm.ranges import require_count

MAX_BUFFERS = 4
# Gaps of poles and zeros on the logistic scale: closer ones cancel digits, wider ones do nothing.
_LEAST_GAP, _MOST_GAP = 1e-3, 20.0


@coded
@dataclass(frozen=True)
class Blt(Unsampled):
    """Buffered linear Toeplitz noise; made by `optimised`.

    Arguments:
        participation: Sampler "separated".
        poles, zeros: (d,) each, in (0, 1), interlacing as in the module's text.

    Guarantee:
        Zero-out of a user whose rounds keep separation and limit of the rule; no assumption about sampling.

    Edge cases:
        Without separation (1) and limit the best C is close to the identity: take the Gaussian mechanism.
    """

    participation: Participation
    poles: tuple[float, ...]
    zeros: tuple[float, ...]

    name: ClassVar[str] = "blt"
    keeps_noise: ClassVar[bool] = True
    samplers: ClassVar[tuple[str, ...]] = ("separated",)
    Options: ClassVar[type] = BltOptions
    summary: ClassVar[str] = "noise correlated over the rounds (buffered linear Toeplitz)"

    def __post_init__(self) -> None:
        """Check that poles and zeros interlace; all that `toeplitz.sensitivity` asks for follows from it."""
        check(self.participation, self.name, self.samplers)
        require_count("privacy.options.buffers", len(self.poles), low=1, high=MAX_BUFFERS)
        chain = [number for pair in zip(self.poles, self.zeros, strict=False) for number in pair]
        falls = all(high > low for high, low in zip([1.0, *chain], [*chain, 0.0], strict=True))
        if len(self.poles) != len(self.zeros) or not falls:
            raise ConfigError(
                f"poles {self.poles} and zeros {self.zeros} must interlace in 1 > pole > zero > pole > ... > 0; "
                "optimise them anew"
            )

    @classmethod
    def optimised(cls, participation: Participation, *, buffers: int = 2) -> Blt:
        """Return the BLT with the least prefix RMSE times sensitivity under a participation rule.

        Arguments:
            participation: With T, b and k.
            buffers: d, in 1..4; 2 or 3 reach within 0.2 % of what more give.

        Raises:
            ConfigError: Not a rule for this mechanism, or too many buffers.
        """
        check(participation, cls.name, cls.samplers)
        require_count("privacy.options.buffers", buffers, low=1, high=MAX_BUFFERS)
        chain = _best_chain(participation, buffers)
        return cls(participation, poles=tuple(chain[0::2].tolist()), zeros=tuple(chain[1::2].tolist()))

    @classmethod
    def planned(cls, participation: Participation, request: Request) -> Blt:
        """Return `optimised`."""
        return cls.optimised(participation, buffers=request.options.buffers)

    @property
    def num_vectors(self) -> int:  # type: ignore[override]
        """d."""
        return len(self.poles)

    @property
    def parameters(self) -> str:  # type: ignore[override]
        """d in words."""
        return f"{len(self.poles)} buffers"

    @property
    def description(self) -> str:
        """Sampling, matrix and sensitivity in words."""
        moved = self.sensitivity(self.participation.rounds)
        return (
            f"{sampling_clause(self.participation)}, buffered linear Toeplitz noise with {len(self.poles)} buffers "
            f"(sensitivity {moved:.4g}, no amplification)"
        )

    @cached_property
    def column(self) -> Floats:
        """First column of C (T,)."""
        return _series(np.array(self.poles), np.array(self.zeros), self.participation.rounds)

    def sensitivity(self, num_releases: int, *, separation: int = 0, max_participations: int = 0) -> float:
        """Return the exact L2 sensitivity of the first `num_releases` rounds."""
        times = most_participations(self.participation, num_releases, separation, max_participations)
        apart = separation or self.participation.separation
        return toeplitz.sensitivity(self.column[:num_releases], separation=apart, participations=times)

    def prefix_rmse(self) -> float:
        """Return the root mean square noise of prefix sums for z = 1."""
        return toeplitz.prefix_rmse(_series(np.array(self.zeros), np.array(self.poles), self.participation.rounds))

    def round_growth(self) -> Floats:
        """Return the norms of the rows of C^-1 (T,)."""
        return np.sqrt(np.cumsum(toeplitz.inverse_column(self.column, self.participation.rounds) ** 2))

    def new_noise(self, size: int) -> RoundNoise:
        """Return the noise of a run, with d buffers of `size` fp64 numbers."""
        return BltNoise(size, np.array(self.poles), np.array(self.zeros))


class BltNoise(StreamedNoise):
    """C^-1 Z row by row, in d buffers.

    Arguments:
        size: P.
        poles, zeros: (d,) of C.
    """

    def __init__(self, size: int, poles: Floats, zeros: Floats) -> None:
        # Rows of C^-1 are 1, then negative numbers that sum to more than -1, since 1 / c(1) > 0.
        super().__init__(size, gain=2.0)
        self._decays = zeros
        self._weights = _weights(zeros, poles)
        self._buffers = np.zeros((len(zeros), size))  # (d, P)

    @property
    def num_bytes(self) -> int:
        """8 d P."""
        return self._buffers.nbytes

    def _step(self, part: slice, stream: NoiseStream) -> Floats:
        draw = np.empty(part.stop - part.start)
        stream.normals(draw)
        noise, scratch = draw.copy(), np.empty_like(draw)
        for buffer, decay, weight in zip(self._buffers[:, part], self._decays, self._weights, strict=True):
            noise += np.multiply(buffer, weight, out=scratch)
            buffer *= decay
            buffer += draw
        return noise


def _weights(poles: Floats, zeros: Floats) -> Floats:
    """Return w (d,) of prod(1 - zero x) / prod(1 - pole x) = 1 + sum_i w_i x / (1 - pole_i x)."""
    gaps = poles[:, None] - poles[None, :] + np.eye(len(poles))  # (d, d)
    return np.asarray(np.prod(poles[:, None] - zeros[None, :], axis=1) / np.prod(gaps, axis=1))


def _series(poles: Floats, zeros: Floats, size: int) -> Floats:
    """Return (size,) the power series of prod(1 - zero x) / prod(1 - pole x)."""
    powers = poles[:, None] ** np.arange(size - 1)[None, :]  # (d, size - 1)
    return np.concatenate([[1.0], _weights(poles, zeros) @ powers])


def _best_chain(rule: Participation, buffers: int) -> Floats:
    """Return pole_1, zero_1, pole_2, ... (2 d,): the best local optimum from a few public starting points."""
    from scipy.optimize import minimize

    times = most_participations(rule, rule.rounds)

    def loss(numbers: Floats) -> float:
        chain = _chain(numbers)
        poles, zeros = chain[0::2], chain[1::2]
        column, inverse = _series(poles, zeros, rule.rounds), _series(zeros, poles, rule.rounds)
        moved = toeplitz.sensitivity(np.minimum.accumulate(column), separation=rule.separation, participations=times)
        return float(np.log(toeplitz.prefix_rmse(inverse) * moved))

    gap = np.log([_LEAST_GAP, _MOST_GAP])
    bounds = [(-20.0, 3.0), *[tuple(gap)] * (2 * buffers - 1)]
    found = []
    for horizon in sorted({rule.rounds, min(rule.separation * 2, rule.rounds)}):
        slowest = -np.log(max(horizon, 4) / 3)
        spread = np.full(2 * buffers - 1, np.log((1 - slowest) / (2 * buffers - 1)))
        found.append(minimize(loss, np.array([slowest, *spread]), method="L-BFGS-B", bounds=bounds))
    return _chain(min(found, key=lambda result: float(result.fun)).x)


def _chain(numbers: Floats) -> Floats:
    """Return a falling chain in (0, 1) for any numbers (2 d,), a start and logarithms of gaps in the logit."""
    rises = np.concatenate([numbers[:1], numbers[0] + np.cumsum(np.exp(numbers[1:]))])
    return np.asarray(1 / (1 + np.exp(rises)))
