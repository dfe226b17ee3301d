"""The privacy test kit: checks of what fedlm promises, for strategies of your own (docs/testkit.md)."""

from fedlm.testkit.checks import CHECKS, check_strategy, check_subject, strategy_checks
from fedlm.testkit.failure import PrivacyTestFailure
from fedlm.testkit.neighbouring_fleet import check_neighbouring_fleets
from fedlm.testkit.strategy_subject import StrategyRun, StrategySubject
from fedlm.testkit.subject import ClaimedGuarantee, Make, Outcome, Setting, Subject

__all__ = [
    "CHECKS",
    "ClaimedGuarantee",
    "Make",
    "Outcome",
    "PrivacyTestFailure",
    "Setting",
    "StrategyRun",
    "StrategySubject",
    "Subject",
    "check_neighbouring_fleets",
    "check_strategy",
    "check_subject",
    "strategy_checks",
]
