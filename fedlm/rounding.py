"""Figures that are bounds, printed so that what is printed still holds: rounded up, with their warnings beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable


def rounded_up(value: float) -> str:
    """Return an epsilon rounded up to four digits: a printed figure never promises more than was computed.

    >>> rounded_up(1.12841), rounded_up(0.000491234)
    ('1.129', '0.0004913')
    """
    if not math.isfinite(value):
        return "infinity"
    if value == 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    rounded = math.ceil(value / step) * step
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:.4g}"


def verdict(warning: str) -> str:
    """Return a warning's verdict without the reason that may follow it.

    >>> verdict("NOT PRIVATE: privacy.reproducible_noise is on")
    'NOT PRIVATE'
    """
    return warning.partition(":")[0]


def stamped(figure: str, warnings: Iterable[str]) -> str:
    """Return a privacy figure with the verdicts of the warnings that it must not be read without.

    >>> stamped("epsilon 2", ["NOT PRIVATE: who knows the seed can subtract the noise", "PER DEVICE: copies"])
    'epsilon 2 [NOT PRIVATE; PER DEVICE]'
    >>> stamped("epsilon 2", [])
    'epsilon 2'
    """
    verdicts = list(dict.fromkeys(map(verdict, warnings)))
    return f"{figure} [{'; '.join(verdicts)}]" if verdicts else figure
