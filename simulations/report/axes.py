"""Axes: domains that end on round numbers, ticks of 1, 2 or 5 times a power of ten, and the map to pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from simulations.report.figures import figure

_STEPS = ((1, math.sqrt(2)), (2, math.sqrt(10)), (5, math.sqrt(50)), (10, math.inf))
_PATTERNS = ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10)))


@dataclass(frozen=True)
class Axis:
    """What an axis shows.

    Arguments:
        label: Quantity and unit.
        whole: Ticks at integers only.
        from_zero: A linear domain includes zero.
        log: Logarithmic; every value must be positive.
        rounded: The domain is widened to the next ticks; else it ends where the values end.
    """

    label: str
    whole: bool = False
    from_zero: bool = False
    log: bool = False
    rounded: bool = True


@dataclass(frozen=True)
class Scale:
    """A map from values to pixels: `low` lands on `start`, `high` on `stop`."""

    low: float
    high: float
    start: float
    stop: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def make_scale(values: Sequence[float], axis: Axis, start: float, stop: float, num_ticks: int = 5) -> Scale:
    """Return the scale that shows every value.

    Arguments:
        values: At least one finite value.
        axis: How to show them.
        start: Pixel of the domain's low end.
        stop: Pixel of its high end.
        num_ticks: About how many ticks.

    Returns:
        The scale with its ticks.
    """
    low, high = _spread(min(values), max(values), axis)
    if axis.log:
        return Scale(low, high, start, stop, _log_ticks(low, high, num_ticks), log=True)
    step = _step((high - low) / num_ticks, whole=axis.whole)
    if axis.rounded:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Scale(low, high, start, stop, tuple(index * step for index in range(first, last + 1)))


def suits_log(values: Sequence[float]) -> bool:
    """Return whether a log scale shows the values better: all positive, and a factor of 20 or more apart."""
    return bool(values) and min(values) > 0 and max(values) >= 20 * min(values)


def tick_labels(scale: Scale) -> list[str]:
    """Return the ticks' labels; on a linear axis all have the same number of decimals."""
    ticks = scale.ticks
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if scale.log or len(ticks) < 2 or not 1e-4 <= largest < 1e7:
        return [figure(tick) for tick in ticks]
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def _spread(low: float, high: float, axis: Axis) -> tuple[float, float]:
    """Widen a domain that would have no width, or less than a tick step of floats can tell apart."""
    if axis.log:
        margin = max((high / low) ** 0.05, 1.25)
        return low / margin, high * margin
    if axis.from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    if axis.from_zero:
        return 0.0, 1.0
    margin = abs(high) / 4 or 1.0
    return low - margin, high + margin


def _step(wanted: float, *, whole: bool) -> float:
    power = 10.0 ** math.floor(math.log10(wanted))
    # The nearest of 1, 2, 5 and 10 by ratio: the limits are the geometric means of neighbours.
    step = power * next(factor for factor, limit in _STEPS if wanted / power < limit)
    return max(step, 1.0) if whole else step


def _log_ticks(low: float, high: float, num_ticks: int) -> tuple[float, ...]:
    """Return the densest of four patterns that is not crowded: decades, 1-3, 1-2-5, or every digit."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = 1 + len(decades) // (num_ticks + 2)
    chosen: tuple[float, ...] = ()
    for factors in _PATTERNS[:1] if stride > 1 else _PATTERNS:
        every = (factor * 10.0**power for power in decades[::stride] for factor in factors)
        ticks = tuple(tick for tick in every if low <= tick <= high)
        if len(ticks) <= num_ticks + 2:
            chosen = ticks
    return chosen
