"""Queries that ride along with the update: further coordinates of the vector that is summed and noised.

A round asks its devices for more than an update: whether the update was clipped (adaptive clipping), how its energy is
spread over the blocks (noise allocation), which words were touched (row selection), a training loss. Answered by a
second noisy sum on the same cohort, each query would have to be composed with the update; composing two queries on the
*same* sampled users as if they were sampled independently understates epsilon (1.00 for a true 1.55). Here all answers
are one vector:

    v = (a_0 y / C, a_1 q_1 / b_1, a_2 q_2 / b_2, ...),   |y| <= C,   |q_i| <= b_i,   a_0^2 + a_1^2 + ... = 1

so |v| <= 1, one Gaussian with multiplier z covers it, and every mechanism, sampler and accountant applies unchanged.
Query i sees the multiplier z / a_i, the update z / a_0: the same as 1/z^2 = 1/z_0^2 + 1/z_1^2 + ... [exact].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedlm.codec import coded, union
from fedlm.config.keys import typed_options
from fedlm.config.schema import OptionValue, OptionValues
from fedlm.errors import DataError
from fedlm.privacy.clipping.query_input import Floats, QueryInput
from fedlm.ranges import require_count, require_number
from fedlm.registry import DP_METRICS

if TYPE_CHECKING:
    from fedlm.privacy.dp_metrics import DPMetric

COUNT_SHARE = 0.1  # of the clip norm, for the count of devices: its noise multiplier is ten times the update's


@union()
@dataclass(frozen=True)
class SideQuery(ABC):
    """One query.

    Arguments:
        share: a_i, in (0, 1).
    """

    share: float
    name: ClassVar[str]
    wants_words: ClassVar[bool] = False
    """Whether `answer` looks at the words of the device."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Coordinates of the answer."""

    @property
    @abstractmethod
    def bound(self) -> float:
        """b_i, the L2 bound of a device's answer."""

    @abstractmethod
    def answer(self, seen: QueryInput) -> Floats:
        """Return one device's answer (size,); the sum clips it to `bound` whatever it is."""


@coded
@dataclass(frozen=True)
class ClipBit(SideQuery):
    """Whether the update was below the clip norm, less the wanted quantile (Andrew et al. 2021, 1905.03871).

    The paper centres the bit at 1/2 and divides by the number of devices that came. Centred at the quantile itself, a
    device that stays away (zero) pushes the clip norm nowhere, so the divisor can be the expected cohort.

    Arguments:
        quantile: gamma, in (0, 1).
    """

    quantile: float
    name: ClassVar[str] = "clip_bit"

    def __post_init__(self) -> None:
        """Check the quantile."""
        require_number("quantile of the clip bit", self.quantile, above=0, below=1)

    @property
    def size(self) -> int:
        """One."""
        return 1

    @property
    def bound(self) -> float:
        """The larger of gamma and 1 - gamma."""
        return max(self.quantile, 1 - self.quantile)

    def answer(self, seen: QueryInput) -> Floats:
        """Return 1 - gamma for an update within the clip norm, -gamma for a larger one."""
        return np.array([float(seen.norm <= seen.clip_norm) - self.quantile])


@coded
@dataclass(frozen=True)
class GroupShares(SideQuery):
    """f_g = |y_g|^2 / |y|^2, which sums to one, so its L2 norm is at most one.

    Arguments:
        num_groups: G.
    """

    num_groups: int
    name: ClassVar[str] = "group_shares"

    def __post_init__(self) -> None:
        """Check the number of groups."""
        require_count("groups of the shares", self.num_groups, low=1)

    @property
    def size(self) -> int:
        """G."""
        return self.num_groups

    @property
    def bound(self) -> float:
        """One."""
        return 1.0

    def answer(self, seen: QueryInput) -> Floats:
        """Return the shares (G,); zeros for a zero update."""
        total = float(seen.group_squares.sum())
        return seen.group_squares / total if total > 0 else np.zeros(self.num_groups)


@coded
@dataclass(frozen=True)
class WordMap(SideQuery):
    """Which words a device has, each with weight 1 / sqrt(number of them): the contribution map of DP row selection.

    Arguments:
        vocabulary_size: V.
    """

    vocabulary_size: int
    name: ClassVar[str] = "word_map"
    wants_words: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the size."""
        require_count("words of the word map", self.vocabulary_size, low=1)

    @property
    def size(self) -> int:
        """V."""
        return self.vocabulary_size

    @property
    def bound(self) -> float:
        """One."""
        return 1.0

    def answer(self, seen: QueryInput) -> Floats:
        """Return the map (V,)."""
        words = np.unique(seen.device_stats.words)
        words = words[(words >= 0) & (words < self.vocabulary_size)]
        found = np.zeros(self.vocabulary_size)
        found[words] = 1 / math.sqrt(max(len(words), 1))
        return found


@coded
@dataclass(frozen=True)
class DPMetrics(SideQuery):
    """Metrics that leave a device, each clipped to [0, bound], and a one to count devices by.

    A metric of share s counts s / 0.1 times as much as the count of devices, so its noise is that much less.

    Arguments:
        names: Of `fedlm.registry.DP_METRICS`.
        options: Pairs of `name.option` and value: those of the metrics that are not to have their defaults.
    """

    names: tuple[str, ...]
    options: tuple[tuple[str, OptionValue], ...] = ()
    name: ClassVar[str] = "metrics"

    @staticmethod
    def of(names: tuple[str, ...], options: OptionValues) -> DPMetrics:
        """Return the side query of some metrics, with the share of the clip norm that they ask for."""
        made = DPMetrics(0.0, names, tuple(options.items()))
        return replace(made, share=COUNT_SHARE * made.bound)

    @cached_property
    def metrics(self) -> tuple[DPMetric, ...]:
        """The metrics; resolved where they are first needed, on a node too."""
        values, found = OptionValues(dict(self.options)), []
        for name in self.names:
            kind, short = DP_METRICS.resolve(name), DP_METRICS.short_name(name)
            found.append(kind(typed_options(kind, values.of(short), f"{DP_METRICS.options_key}.{short}")))
        return tuple(found)

    @property
    def size(self) -> int:
        """One more than there are metrics."""
        return len(self.names) + 1

    @property
    def bound(self) -> float:
        """Root of the sum of the squared weights: each coordinate is at most its weight."""
        return math.sqrt(math.fsum(weight**2 for weight in (*self._weights, 1.0)))

    @property
    def wants_words(self) -> bool:  # type: ignore[override]
        """Whether any metric does."""
        return any(metric.wants_words for metric in self.metrics)

    @property
    def _weights(self) -> list[float]:
        return [metric.share / COUNT_SHARE for metric in self.metrics]

    def answer(self, seen: QueryInput) -> Floats:
        """Return each metric as a part of its bound times its weight, then 1."""
        values = [metric.value(seen) / metric.bound for metric in self.metrics]
        return np.append(np.clip(np.nan_to_num(values, nan=1.0), 0, 1) * self._weights, 1.0)

    def means(self, totals: Floats) -> dict[str, float]:
        """Return the mean of each metric over the devices that came, from the noised sums (size,).

        Post-processing: a noised sum over a noised count. With a count near zero the ratio means nothing: NaN.
        """
        count = float(totals[-1])
        ratios = totals[:-1] / self._weights / count if count > 0 else np.full(len(self.names), math.nan)
        bounded = np.clip(ratios, 0, 1)
        found = zip(self.names, self.metrics, bounded, strict=True)
        return {DP_METRICS.short_name(name): float(ratio * metric.bound) for name, metric, ratio in found}


def answer_units(side_query: SideQuery, seen: QueryInput, clip_norm: float) -> Floats:
    """Return a device's answer (size,) in units of the summed vector: L2 norm at most share * clip_norm.

    Edge cases: an answer that is not finite counts as zero; one beyond its bound is scaled back to it.

    Raises:
        DataError: The query fails on this device, or answers with other than `size` numbers.
    """
    try:
        answer = np.asarray(side_query.answer(seen), np.float64)
    except Exception as error:  # a DP metric of somebody's own may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"the side query {side_query.name!r} fails on a device ({reason})") from error
    if answer.shape != (side_query.size,):
        raise DataError(f"the side query {side_query.name!r} answers {answer.shape}, must be ({side_query.size},)")
    norm = float(np.linalg.norm(answer))
    if not math.isfinite(norm):
        return np.zeros(side_query.size)
    return answer * (side_query.share * clip_norm / max(norm, side_query.bound))


def update_share(side_queries: tuple[SideQuery, ...]) -> float:
    """Return a_0, what the side queries leave to the update."""
    return math.sqrt(1 - math.fsum(side_query.share**2 for side_query in side_queries))
