"""The checks by name, for one call or for pytest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedlm.config.schema import PrivacyConfig, RowsConfig, StrategyConfig
from fedlm.testkit.clip_bound import clip_bound
from fedlm.testkit.cohort_law import cohorts
from fedlm.testkit.dense_support import dense_support
from fedlm.testkit.freshness import freshness
from fedlm.testkit.noise_law import noise_law
from fedlm.testkit.post_processing import post_processing
from fedlm.testkit.sensitivity import sensitivity
from fedlm.testkit.strategy_subject import StrategyMaker, StrategySubject
from fedlm.testkit.subject import Make
from fedlm.testkit.two_worlds import two_worlds

CHECKS: dict[str, Callable[[Make], None]] = {
    "clip bound": clip_bound,
    "record and replay": sensitivity,
    "noise law": noise_law,
    "fresh noise": freshness,
    "dense support": dense_support,
    "two worlds": two_worlds,
    "post-processing": post_processing,
    "cohorts": cohorts,
}
"""Every check; each takes what makes runs, and raises `PrivacyTestFailure`."""


@dataclass(frozen=True)
class StrategyCheck:
    """One check of a strategy: a test of its own name under `pytest.mark.parametrize(..., ids=str)`."""

    name: str

    def __call__(
        self,
        strategy: StrategyMaker,
        privacy_config: PrivacyConfig | None = None,
        strategy_config: StrategyConfig | None = None,
        rows_config: RowsConfig | None = None,
    ) -> None:
        """Run the check; arguments as for `check_strategy`."""
        privacy, own = privacy_config or PrivacyConfig(), strategy_config or StrategyConfig()
        make = StrategySubject(strategy, privacy, own, rows_config)
        CHECKS[self.name](make)

    def __str__(self) -> str:
        """Return the name."""
        return self.name


def strategy_checks() -> list[StrategyCheck]:
    """Return all checks, for pytest.

    @pytest.mark.parametrize("check", strategy_checks(), ids=str)
    def test_privacy(check):
        check(MyStrategy)
    """
    return [StrategyCheck(name) for name in CHECKS]


def check_strategy(
    strategy: StrategyMaker,
    privacy_config: PrivacyConfig | None = None,
    strategy_config: StrategyConfig | None = None,
    rows_config: RowsConfig | None = None,
) -> None:
    """Run every check against a strategy under a privacy plan; some seconds.

    Arguments:
        strategy: The class, or whatever makes a strategy from a `StrategyConfig`.
        privacy_config: Mechanism and options; clip norm, noise and fleet are the kit's. Default: DP-FedAvg.
        strategy_config: Given to the strategy.
        rows_config: DP selection of embedding rows; the kit sets the count.

    Raises:
        PrivacyTestFailure: One sentence: which guarantee broke, how, with figures.

    Guarantee:
        A correct strategy fails with probability below 1e-6. One that passes is not proven private: each check states
        what it finds.
    """
    for check in strategy_checks():
        check(strategy, privacy_config, strategy_config, rows_config)


def check_subject(make: Make) -> None:
    """Run every check against runs of anything that fulfils `Subject`.

    Arguments:
        make: Called with a `Setting`, returns a new run.

    Raises:
        PrivacyTestFailure: As `check_strategy`.
    """
    for check in CHECKS.values():
        check(make)
