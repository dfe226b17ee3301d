"""Tree aggregation with Honaker's estimates: the legacy baseline of correlated noise (Honaker 2015, "Efficient use of
differentially private binary trees"; Kairouz et al. 2021, "Practical and private (deep) learning without sampling or
shuffling", https://arxiv.org/abs/2103.00039).

Every dyadic block of rounds has a node that holds the block's sum plus N(0, z^2). The sum of a block is estimated from
its node and its two halves, weighted by inverse variance: v_0 = 1, v_(h+1) = 2 v_h / (2 v_h + 1). A prefix sum is the
sum of the estimates of its binary digits' blocks; what a round releases is the difference of two consecutive prefix
estimates.

Here C is not a square matrix with a unit diagonal but the (nodes, rounds) matrix of who is in which block, complete
blocks alone, and the release is a left inverse of it. So the sensitivity is that of the nodes,

    zeta = max over a user's possible rounds of sum over nodes of (the user's rounds in it)^2,    rho = zeta / (2 z^2).

Exact: zeta, by a dynamic programme over blocks; epsilon, of the Gaussian with mu = sqrt(2 rho). What is published for
rho (8.90 for 0.806 at delta 1e-10) is the larger figure of the general conversion from zCDP. A device sends nothing
for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedlm.codec import coded
from fedlm.privacy.mechanisms.base import Floats, Participation, RoundNoise
from fedlm.privacy.mechanisms.participations import check, most_participations, sampling_clause
from fedlm.privacy.mechanisms.streaming import StreamedNoise
from fedlm.privacy.mechanisms.unsampled import Unsampled
from fedlm.privacy.noise.lattice import NoiseStream

# For each gap that is left after a block: the largest sum of squares (counts,) by the number of rounds in it, -1: none.
Outcomes = dict[int, npt.NDArray[np.int64]]


@coded
@dataclass(frozen=True)
class Tree(Unsampled):
    """Tree aggregation; see the module.

    Arguments:
        participation: Sampler "separated".

    Guarantee:
        Zero-out of a user whose rounds keep separation and limit of the rule; no assumption about sampling.

    Edge cases:
        Blocks that reach beyond round T are never released and cost nothing.
    """

    participation: Participation

    name: ClassVar[str] = "tree"
    keeps_noise: ClassVar[bool] = True
    samplers: ClassVar[tuple[str, ...]] = ("separated",)
    summary: ClassVar[str] = "noise correlated over the rounds (tree aggregation)"

    def __post_init__(self) -> None:
        """Check the participation rule."""
        check(self.participation, self.name, self.samplers)

    @property
    def num_vectors(self) -> int:  # type: ignore[override]
        """One for each height of the tree."""
        return self.participation.rounds.bit_length()

    @property
    def description(self) -> str:
        """Sampling, tree and sensitivity in words."""
        moved = self.sensitivity(self.participation.rounds)
        return (
            f"{sampling_clause(self.participation)}, tree aggregation with Honaker's estimates "
            f"(sensitivity {moved:.4g}, no amplification)"
        )

    def sensitivity(self, num_releases: int, *, separation: int = 0, max_participations: int = 0) -> float:
        """Return sqrt(zeta) of the first `num_releases` rounds."""
        times = most_participations(self.participation, num_releases, separation, max_participations)
        return math.sqrt(zeta(num_releases, separation or self.participation.separation, times))

    def prefix_rmse(self) -> float:
        """Return the root mean square noise of prefix sums for z = 1."""
        rounds = self.participation.rounds
        # A prefix has the variances of the blocks of its binary digits.
        digits = np.arange(1, rounds + 1)[:, None] >> np.arange(rounds.bit_length()) & 1  # (T, heights)
        return math.sqrt(float((digits @ _variances(rounds)).mean()))

    def new_noise(self, size: int) -> RoundNoise:
        """Return the noise of a run, with one vector of `size` fp64 numbers for each height of the tree."""
        return TreeNoise(size, self.participation.rounds)


class TreeNoise(StreamedNoise):
    """Differences of the errors of consecutive prefix estimates.

    The blocks of a prefix are a binary counter: round t merges those of its trailing zero digits into one.

    Arguments:
        size: P.
        rounds: T.
    """

    def __init__(self, size: int, rounds: int) -> None:
        self._variances = _variances(rounds)
        gains = [1.0]
        for variance in self._variances[1:]:
            gains.append(variance + 2 * (1 - variance) * gains[-1])
        super().__init__(size, gain=sum(gains))
        self._errors = np.zeros((len(self._variances), size))  # (heights, P), of the block of each digit that is set

    @property
    def num_bytes(self) -> int:
        """8 P for each height."""
        return self._errors.nbytes

    def _step(self, part: slice, stream: NoiseStream) -> Floats:
        height = (self._round & -self._round).bit_length() - 1
        error, own, before = (np.zeros(part.stop - part.start) for _ in range(3))
        stream.normals(error)
        for level in range(height):
            merged, variance = self._errors[level, part], self._variances[level + 1]
            before += merged
            error += merged
            error *= 1 - variance
            stream.normals(own)
            own *= variance
            error += own
        self._errors[height, part] = error
        error -= before
        return error


@lru_cache(maxsize=65_536)
def zeta(num_releases: int, separation: int, participations: int) -> int:
    """Return the squared L2 sensitivity of all nodes that are complete after `num_releases` rounds.

    Arguments:
        num_releases: t.
        separation: b, two of a user's rounds are at least this far apart.
        participations: k, a user's most rounds.
    """
    outcomes = {0: np.zeros(1, np.int64)}
    for height in reversed(range(num_releases.bit_length())):
        if num_releases >> height & 1:
            outcomes = _followed(outcomes, height, separation, participations)
    return max(int(best.max()) for best in outcomes.values())


@lru_cache(maxsize=4_096)
def _block(height: int, gap: int, separation: int, participations: int) -> Outcomes:
    """Return the outcomes of a block of 2^height rounds of which the first `gap` are barred by earlier participation.

    A user's rounds are as early as the counts in the blocks below allow, which leaves most room to later ones.
    """
    size = 1 << height
    if size <= separation:
        nobody = {max(0, gap - size): np.zeros(1, np.int64)}
        once = {gap + separation - size: np.array([-1, height + 1])} if gap < size else {}
        return _undominated([nobody, once])
    half = _block(height - 1, gap, separation, participations)
    both = _followed(half, height - 1, separation, participations)
    for best in both.values():
        best[best >= 0] += np.arange(len(best))[best >= 0] ** 2
    return _undominated([both])


def _followed(first: Outcomes, height: int, separation: int, participations: int) -> Outcomes:
    """Return the outcomes of what `first` describes with a block after it."""
    found = []
    for gap, left in first.items():
        for after, right in _block(height, gap, separation, participations).items():
            found.append({after: _joined(left, right)[: participations + 1]})
    return _undominated(found)


def _joined(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the largest sums left[i] + right[j] by i + j."""
    best = np.full(len(left) + len(right) - 1, -1)
    short, long = sorted((left, right), key=len)
    for count in np.flatnonzero(short >= 0):
        part = best[count : count + len(long)]
        np.maximum(part, np.where(long >= 0, long + short[count], -1), out=part)
    return best


def _undominated(found: list[Outcomes]) -> Outcomes:
    """Return outcomes without those that another one with no larger gap left matches."""
    length = max(len(best) for outcomes in found for best in outcomes.values())
    merged: Outcomes = {}
    for gap, best in ((gap, best) for outcomes in found for gap, best in outcomes.items()):
        row = merged.setdefault(gap, np.full(length, -1))
        np.maximum(row[: len(best)], best, out=row[: len(best)])
    reached = np.full(length, -1)
    kept = {}
    for gap in sorted(merged):
        better = merged[gap] > reached
        if better.any():
            kept[gap] = np.where(better, merged[gap], -1)
            np.maximum(reached, merged[gap], out=reached)
    return kept


def _variances(rounds: int) -> Floats:
    """Return v_h (heights,) for the heights of blocks in `rounds` rounds."""
    values = [1.0]
    while len(values) < rounds.bit_length():
        values.append(2 * values[-1] / (2 * values[-1] + 1))
    return np.array(values)
