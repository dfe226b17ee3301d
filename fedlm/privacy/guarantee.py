"""What a run promises: one value, whether a user, an example or a device's sequence is protected, whoever prints it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fedlm.errors import BudgetExceededError
from fedlm.rounding import rounded_up, stamped

_ACCOUNTANT = 1e-4
"""How far, relatively, another version of the accountant may round otherwise."""


@dataclass(frozen=True)
class Guarantee:
    """A differential privacy guarantee with the warnings that take it back where it does not hold.

    Arguments:
        unit: What is protected.
        adjacency: In what two data sets differ that must look alike.
        epsilon: Upper bound; infinity where nothing is guaranteed.
        delta: Of the same guarantee.
        sentences: The guarantee in words, with every figure it rests on, and against whom it holds.
        warnings: What must stand wherever epsilon stands ("stamps"): a verdict, a colon, the reason. None if it holds.
    """

    unit: str
    adjacency: str
    epsilon: float
    delta: float
    sentences: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def statement(self) -> str:
        """The whole guarantee as running text, warnings included."""
        return " ".join([*self.sentences, *(f"{warning}." for warning in self.warnings)])

    def warned(self, *warnings: str) -> Guarantee:
        """Return the same guarantee with further warnings."""
        return replace(self, warnings=(*self.warnings, *warnings))


def to_lines(guarantee: Guarantee) -> list[str]:
    """Return a guarantee as lines of text: epsilon with the warnings' verdicts, then a sentence or a warning a line."""
    spent = f"epsilon {rounded_up(guarantee.epsilon)} at delta {guarantee.delta:g}"
    headline = stamped(spent if math.isfinite(guarantee.epsilon) else "no finite epsilon", guarantee.warnings)
    return [headline, *guarantee.sentences, *(f"{warning}." for warning in guarantee.warnings)]


def to_dict(guarantee: Guarantee) -> dict[str, object]:
    """Return a guarantee as JSON-ready values; an infinite epsilon is None."""
    return {
        "unit": guarantee.unit,
        "adjacency": guarantee.adjacency,
        "epsilon": guarantee.epsilon if math.isfinite(guarantee.epsilon) else None,
        "delta": guarantee.delta,
        "privacy_statement": guarantee.statement,
        "stamps": list(guarantee.warnings),
    }


def large_delta(delta: float, count: int, *, things: str, key: str) -> tuple[str, ...]:
    """Return the warning of a delta at which a mechanism may publish one of `count` things whole; none if it is less.

    Arguments:
        delta: Of the guarantee.
        count: How many users or examples the guarantee counts.
        things: What they are.
        key: What to lower.

    Source: publishing each record with probability delta is (0, delta)-private (Dwork and Roth 2014, section 2.3).
    """
    if delta < 1 / count:
        return ()
    return (
        f"weak guarantee: delta {delta:g} is not below 1 / {count:,} {things}, so that whole {things} may be "
        f"published; lower {key}",
    )


def check_budget(spent: float, budget: float, *, what: str, fix: str) -> None:
    """Refuse what costs more than its budget.

    Arguments:
        spent: Epsilon of the whole run; infinity where nothing is guaranteed.
        budget: Epsilon at most; 0: there is no budget.
        what: What costs it.
        fix: What to do.

    Raises:
        BudgetExceededError: It costs more than the fourth digit of the accountant leaves open.
    """
    if budget and spent > budget * (1 + _ACCOUNTANT):
        raise BudgetExceededError(f"{what} costs epsilon {rounded_up(spent)}, allowed is {budget:.4g}; {fix}")
