"""The test kit: correct implementations pass every check, every mutant is caught by the check that is named for it."""

from __future__ import annotations

from pathlib import Path

import kit_mutants
import pytest
from kit_plain import Adaptive, Correlated, Plain

from fedlm.config.schema import PrivacyConfig
from fedlm.privacy.testkit import CHECKS, Make, PrivacyTestFailure, StrategySubject, check_strategy, strategy_checks
from server.strategies import FedAdam, FedAvg

CORRECT: dict[str, Make] = {
    "plain": Plain,
    "adaptive clip": Adaptive,
    "correlated": Correlated,
    "fedavg": StrategySubject(FedAvg),
    "fedadam": StrategySubject(FedAdam),
    "fedavg, adaptive clip": StrategySubject(FedAvg, PrivacyConfig(clip_quantile=0.5)),
    "fedavg, adaptive allocation and a metric": StrategySubject(
        FedAvg, PrivacyConfig(allocation="adaptive", metrics=("train_loss",))
    ),
    "fedavg, clip norm by group": StrategySubject(FedAvg, PrivacyConfig(allocation="per_group")),
    "fedavg, BLT": StrategySubject(FedAvg, PrivacyConfig(mechanism="blt")),
    "fedavg, banded": StrategySubject(FedAvg, PrivacyConfig(mechanism="banded", bands=2)),
    "fedavg, tree": StrategySubject(FedAvg, PrivacyConfig(mechanism="tree")),
    "fedavg, fixed cohorts": StrategySubject(FedAvg, PrivacyConfig(sampler="fixed")),
}
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "testkit.md"


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CORRECT)
def test_correct_implementations_pass(name: str, check: str) -> None:
    CHECKS[check](CORRECT[name])


@pytest.mark.parametrize("name", kit_mutants.MUTANTS)
def test_every_mutant_is_caught(name: str) -> None:
    make, check = kit_mutants.MUTANTS[name]
    with pytest.raises(PrivacyTestFailure) as caught:
        CHECKS[check](make)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert any(figure.isdigit() for figure in sentence)


def test_the_documents_table_is_that_of_the_mutants() -> None:
    assert kit_mutants.table() in DOCUMENT.read_text()


def test_a_third_party_gets_a_named_test_for_each_check() -> None:
    assert [str(check) for check in strategy_checks()] == list(CHECKS)


def test_check_strategy_stops_at_the_first_lie() -> None:
    lie = kit_mutants.MUTANTS["a strategy that doubles a sum through its view"][0]
    with pytest.raises(PrivacyTestFailure, match="clip bound: a device with"):
        check_strategy(lie.strategy)
