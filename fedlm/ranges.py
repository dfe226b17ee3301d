"""One wording for every range error of the privacy core: what, the value, what is allowed, the fix."""

from __future__ import annotations

import math

from fedlm.errors import ConfigError


def require_number(
    name: str,
    value: float,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    fix: str = "",
) -> float:
    """Return `value` as a float if it is a finite number in the range.

    Arguments:
        name: The option, as the user knows it.
        value: What the user gave.
        low, high: Inclusive bounds.
        above, below: Exclusive bounds.
        fix: What to do, appended to the message.

    Raises:
        ConfigError: Not a number, not finite, or out of the range.
    """
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    bounds = [
        (low, number >= (low or 0), ">="),
        (above, number > (above or 0), ">"),
        (high, number <= (high or 0), "<="),
        (below, number < (below or 0), "<"),
    ]
    active = [(bound, holds, sign) for bound, holds, sign in bounds if bound is not None]
    if math.isfinite(number) and all(holds for _, holds, _ in active):
        return number
    allowed = " and ".join(["finite", *(f"{sign} {bound:,}" for bound, _, sign in active)])
    raise ConfigError(f"{name} = {value!r} must be {allowed}" + (f"; {fix}" if fix else ""))


def require_count(name: str, value: int, *, low: int = 0, high: int | None = None, fix: str = "") -> int:
    """Return `value` if it is a whole number (not a bool) from `low` to `high`, else raise `ConfigError`."""
    if isinstance(value, int) and not isinstance(value, bool) and low <= value and (high is None or value <= high):
        return value
    allowed = f"a whole number >= {low:,}" + ("" if high is None else f" and <= {high:,}")
    raise ConfigError(f"{name} = {value!r} must be {allowed}" + (f"; {fix}" if fix else ""))
