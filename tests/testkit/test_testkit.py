"""The test kit: correct implementations pass every check, every mutant is caught by the check that is named for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kit_mutants
import pytest
from kit_plain import Adaptive, Correlated, Plain, Scaled, Separated

from fedlm.config.schema import OptionValues, PrivacyConfig, RowsConfig
from fedlm.privacy.adaptive.allocation import KINDS
from fedlm.registry import COHORT_SAMPLERS, DP_METRICS, MECHANISMS
from fedlm.strategies.fedadam import FedAdam
from fedlm.strategies.fedavg import FedAvg
from fedlm.testkit import CHECKS, Make, PrivacyTestFailure, StrategySubject, check_strategy, strategy_checks

ALL = tuple(CHECKS)
SUM = ("clip bound", "record and replay", "noise law")
KEPT = ("record and replay", "noise law", "fresh noise", "dense support", "post-processing", "cohorts")


def plan(**options: Any) -> StrategySubject:
    return StrategySubject(FedAvg, PrivacyConfig(**options))


CORRECT: dict[str, tuple[Make, tuple[str, ...]]] = {
    "plain": (Plain, ALL),
    "adaptive clip": (Adaptive, ALL),
    "pre-conditioned": (Scaled, ALL),
    "in turn": (Separated, ALL),
    "correlated": (Correlated, ALL),
    "fedavg": (plan(), ALL),
    "fedadam": (StrategySubject(FedAdam), ("record and replay", "fresh noise", "dense support", "post-processing")),
    "fedavg, adaptive clip": (plan(clip_quantile=0.5), ALL),
    "fedavg, row selection and metrics": (
        StrategySubject(
            FedAvg,
            PrivacyConfig(metrics=DP_METRICS.built_in),
            rows_config=RowsConfig(options=OptionValues({"selection_rounds": 2})),
        ),
        ("clip bound", *KEPT),
    ),
    "fedavg, adaptive allocation and a metric": (
        plan(allocation="adaptive", metrics=("train_loss",)),
        (*SUM, "fresh noise", "dense support", "post-processing"),
    ),
    "fedavg, public scales": (plan(allocation="public"), SUM),
    "fedavg, public scales and adaptive clip": (plan(allocation="public", clip_quantile=0.5), ("noise law",)),
    "fedavg, clip norm by group": (plan(allocation="per_group"), (*SUM, "two worlds")),
    "fedavg, allocation as published": (plan(allocation="published"), (*SUM, "post-processing")),
    "fedavg, BLT and a metric": (plan(mechanism="blt", metrics=("num_tokens",)), KEPT),
    "fedavg, banded, cyclic": (plan(mechanism="banded", options=OptionValues({"bands": 2})), (*KEPT, "two worlds")),
    "fedavg, banded, separated": (
        plan(mechanism="banded", options=OptionValues({"bands": 3}), sampler="separated"),
        KEPT,
    ),
    "fedavg, tree": (plan(mechanism="tree"), KEPT),
    "fedavg, fixed cohorts": (plan(sampler="fixed"), ("record and replay", "cohorts")),
    "fedavg, cut cohorts": (plan(sampler="truncated_poisson", cap=11), ("record and replay", "cohorts", "two worlds")),
    "fedavg, cohorts in turn": (plan(sampler="separated"), ("record and replay", "cohorts")),
    "fedavg, local noise": (plan(mechanism="local"), ALL),
    "fedavg, local noise and a metric": (plan(mechanism="local", sampler="poisson", metrics=("train_loss",)), KEPT),
}
"""What must pass, and the checks of it whose outcome could differ from that of the others."""
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "testkit.md"


@pytest.mark.parametrize(
    ("name", "check"), [(name, check) for name, (_, checks) in CORRECT.items() for check in checks]
)
def test_correct_implementations_pass(name: str, check: str) -> None:
    CHECKS[check](CORRECT[name][0])


def test_every_option_of_privacy_that_changes_a_release_is_examined() -> None:
    examined = [make.privacy_config for make, _ in CORRECT.values() if isinstance(make, StrategySubject)]
    assert {config.mechanism for config in examined} == {
        name for name in MECHANISMS.built_in if MECHANISMS.resolve(name).trusts_server
    }
    assert {config.allocation for config in examined} == set(KINDS)
    samplers = {config.sampler or MECHANISMS.resolve(config.mechanism).samplers[0] for config in examined}
    assert samplers == {*COHORT_SAMPLERS.built_in}
    assert {metric for config in examined for metric in config.metrics} == set(DP_METRICS.built_in)


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
    lie = kit_mutants.MUTANTS["a strategy that counts its rounds on the object"][0]
    assert isinstance(lie, StrategySubject)
    with pytest.raises(PrivacyTestFailure, match="post-processing: 'values' after round 2"):
        check_strategy(lie.strategy)
