"""What may leave once: the numbered releases of a plan."""

from __future__ import annotations

import math
from threading import Lock

from fedlm.errors import BudgetExceededError


class ReleasedOnce:
    """The releases that this process has made, so that none is made twice; safe across threads.

    Arguments:
        unit: What a number counts: "round" or "step".
    """

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._claimed: set[int] = set()
        self._lock = Lock()

    def claim(self, number: int, *, most: float = math.inf) -> None:
        """Record a release before its noise is drawn; a failure afterwards still counts.

        Arguments:
            number: Of the round or step.
            most: How many releases are paid for.

        Raises:
            BudgetExceededError: It was released before, or all that are paid for were.
        """
        with self._lock:
            if number in self._claimed:
                raise BudgetExceededError(
                    f"{self._unit} {number} was already released, its data may leave once; keep what was released"
                )
            if len(self._claimed) >= most:
                raise BudgetExceededError(
                    f"all {most:,} planned {self._unit}s were released; plan more {self._unit}s at the start"
                )
            self._claimed.add(number)
