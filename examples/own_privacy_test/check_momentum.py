"""Does a strategy of one's own keep the promise? Three lines for pytest, or one call.

    python check_momentum.py        prints a line for each guarantee
    pytest check_momentum.py        a named test for each guarantee

`Honest` uses the noised mean alone. `Curious` does what looks harmless: it slows down when the cohort's raw sum is
small. The raw sum is private, so the model now tells what the noise was to hide; the kit says so in one sentence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedlm.privacy.testkit import PrivacyTestFailure, strategy_checks
from fedlm.strategy import Release, StrategyState, SumStrategy
from fedlm.trainable.spec import Vector


class Honest(SumStrategy):
    """Heavy-ball momentum on the noised mean update."""

    slot_names = ("momentum",)

    def step(self, state: StrategyState, values: Vector, mean: Vector) -> tuple[Vector, dict[str, float]]:
        """Update the momentum in place and move along it."""
        momentum = state.slots["momentum"]
        momentum *= 0.9
        momentum += mean
        return values + self.config.learning_rate * momentum, {}


class Curious(Honest):
    """The same, with a peek."""

    rate = 1.0

    def finish(self, state: StrategyState, release: Release) -> tuple[StrategyState, dict[str, float]]:
        """Look at the raw sum before it is released."""
        assert state.total is not None
        raw, _ = state.total.to_arrays()
        self.rate = 1.0 if np.abs(raw).max() > 2**30 else 0.5
        return super().finish(state, release)

    def step(self, state: StrategyState, values: Vector, mean: Vector) -> tuple[Vector, dict[str, float]]:
        """Move less when the sum was small."""
        return super().step(state, values, mean * np.float32(self.rate))


@pytest.mark.parametrize("check", strategy_checks(), ids=str)
def test_privacy(check: Any) -> None:
    """Eight named tests."""
    check(Honest)


def main() -> None:
    """Print what each check finds."""
    for strategy in (Honest, Curious):
        for check in strategy_checks():
            try:
                check(strategy)
                print(f"{strategy.__name__}: {check}: holds")
            except PrivacyTestFailure as failure:
                print(f"{strategy.__name__}: {failure}")


if __name__ == "__main__":
    main()
