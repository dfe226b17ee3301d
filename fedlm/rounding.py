"""Figures that are bounds, rounded so that what is printed still holds."""

from __future__ import annotations

import math


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
