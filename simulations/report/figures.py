"""Figures as a reader wants them: few digits, units, thousands set apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal

ABSENT = "–"  # noqa: RUF001
"""Stands where a run measured nothing."""


def figure(value: float | None, digits: int = 4) -> str:
    """Return a number with so many significant digits at most; whole numbers keep all of theirs.

    >>> figure(412.2678), figure(12345.6), figure(0.00001234), figure(0.3), figure(None)
    ('412.3', '12,346', '1.234e-5', '0.3', '–')
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    exponent = math.floor(math.log10(abs(value)))
    if not -4 <= exponent < 9:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{_strip(mantissa)}e{int(power)}"
    return _strip(f"{value:,.{max(digits - 1 - exponent, 0)}f}")


def bound(value: float | None, digits: int = 4) -> str:
    """Return an upper bound, such as an epsilon, rounded up: what is printed still holds.

    >>> bound(1.97401), bound(2.0), bound(None)
    ('1.975', '2', '–')
    """
    if value is None or not math.isfinite(value) or value <= 0:
        return figure(value)
    unit = Decimal(1).scaleb(Decimal(value).adjusted() - digits + 1)
    # A float that was meant as a short decimal (0.3) may lie a hair above it.
    return figure(float(Decimal(value * (1 - 1e-12)).quantize(unit, ROUND_CEILING)), digits)


def column(values: Iterable[float | None], digits: int = 4) -> list[str]:
    """Return a column of numbers with the same decimals, enough for the largest's significant digits.

    >>> column([412.2678, None, 97.5])
    ['412.3', '–', '97.5']
    """
    known = list(values)
    finite = [abs(value) for value in known if value is not None and math.isfinite(value)]
    largest = max(finite, default=0) or 1
    if not 1e-6 <= largest < 1e9:
        return [figure(value, digits) for value in known]
    whole = all(value == int(value) for value in finite)
    decimals = 0 if whole else max(digits - 1 - math.floor(math.log10(largest)), 0)
    return [ABSENT if value is None or not math.isfinite(value) else f"{value:,.{decimals}f}" for value in known]


def count(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> count(1, "round"), count(1200, "round")
    ('1 round', '1,200 rounds')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def moment(value: object) -> str:
    """Return a time stamp (ISO 8601 or seconds since 1970) to the minute; what is neither stays as it is.

    >>> moment("2026-02-11T09:30:12Z"), moment(0), moment("today")
    ('2026-02-11 09:30 UTC', '1970-01-01 00:00 UTC', 'today')
    """
    try:
        time = (
            datetime.fromtimestamp(value, UTC) if isinstance(value, int | float) else datetime.fromisoformat(str(value))
        )
    except (ValueError, OverflowError, OSError):
        return str(value)
    return f"{time:%Y-%m-%d %H:%M %Z}".strip()


def data_size(num_bytes: float) -> str:
    """Return bytes in kB, MB or GB (powers of ten, as networks count).

    >>> data_size(512), data_size(18_432), data_size(2_310_144)
    ('512 B', '18.4 kB', '2.31 MB')
    """
    divisor, unit = size_unit(num_bytes)
    return f"{figure(num_bytes / divisor, 3)} {unit}"


def size_unit(num_bytes: float) -> tuple[float, str]:
    """Return the divisor and the name of the unit that suits a number of bytes."""
    for divisor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= divisor:
            return divisor, unit
    return 1.0, "B"


def duration(seconds: float) -> str:
    """Return seconds in the two units that matter.

    >>> duration(7.25), duration(204.2), duration(7500)
    ('7.2 s', '3 min 24 s', '2 h 05 min')
    """
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"


def share(part: float, whole: float) -> str:
    """Return a part of a whole in per cent; what is there never reads as nothing.

    >>> share(91, 100), share(1, 5000), share(0, 0)
    ('91 %', '< 1 %', '0 %')
    """
    per_cent = 100 * part / whole if whole else 0.0
    return "< 1 %" if 0 < per_cent < 1 else f"{per_cent:.0f} %"


def change(before: float, after: float) -> str:
    """Return a change in words that need no colour and no arrow.

    >>> change(400.0, 230.0), change(1.0, 1.0), change(2.0, 3.0)
    ('42.5 % lower', 'unchanged', '50.0 % higher')
    """
    ratio = after / before - 1
    if abs(ratio) < 5e-4:
        return "unchanged"
    return f"{abs(ratio):.1%}".replace("%", " %") + (" lower" if ratio < 0 else " higher")


def _strip(decimal: str) -> str:
    return decimal.rstrip("0").rstrip(".") if "." in decimal else decimal
