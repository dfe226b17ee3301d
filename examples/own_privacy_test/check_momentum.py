"""Does a strategy of one's own keep the promise? Three lines for pytest, or one call.

    python check_momentum.py        prints a line for each guarantee
    pytest check_momentum.py        a named test for each guarantee

`Honest` keeps its momentum in the state. `Forgetful` keeps it on the object, which no checkpoint stores: a run that was
stopped and resumed goes on without it, and ends with another model. The kit says so in one sentence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedlm.strategies import Release, ServerOptimizer, StrategyState, Vector
from fedlm.testkit import PrivacyTestFailure, strategy_checks


class Honest(ServerOptimizer):
    """Heavy-ball momentum on the noised mean update."""

    slot_names = ("momentum",)

    def update(self, state: StrategyState, release: Release) -> tuple[Vector, dict[str, float]]:
        """Update the momentum in place and move along it."""
        momentum = state.slots["momentum"]
        momentum *= 0.9
        momentum += release.mean
        return state.values + self.config.learning_rate * momentum, {}


class Forgetful(ServerOptimizer):
    """The same, remembered in the wrong place."""

    momentum: Any = 0.0

    def update(self, state: StrategyState, release: Release) -> tuple[Vector, dict[str, float]]:
        """Move along a momentum that no checkpoint stores."""
        self.momentum = np.float32(0.9) * self.momentum + release.mean
        return state.values + self.config.learning_rate * self.momentum, {}


@pytest.mark.parametrize("check", strategy_checks(), ids=str)
def test_privacy(check: Any) -> None:
    """Eight named tests."""
    check(Honest)


def main() -> None:
    """Print what each check finds."""
    for strategy in (Honest, Forgetful):
        for check in strategy_checks():
            try:
                check(strategy)
                print(f"{strategy.__name__}: {check}: holds")
            except PrivacyTestFailure as failure:
                print(f"{strategy.__name__}: {failure}")


if __name__ == "__main__":
    main()
