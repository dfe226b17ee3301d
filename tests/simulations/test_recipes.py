"""Every recipe that ships is a valid config whose plan keeps its budget, over all its rounds or steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlm.config import load_config
from fedlm.finetuning.run import make_plan
from fedlm.privacy import PrivacyPlan

FINETUNED = {"sst2": 67_349, "e2e": 42_061}  # recipes of `fedlm finetune`, and the examples of their corpora
ALL = sorted((Path(__file__).resolve().parents[2] / "simulations" / "recipes").glob("*.toml"))
RECIPES = [path for path in ALL if path.stem not in FINETUNED]
CHAT_USERS = 1_015  # training users of the chat corpus, which the recipes take unless they say otherwise


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_keeps_its_budget_and_its_own_participation_rule(path: Path) -> None:
    config = load_config(path, [])
    plan = PrivacyPlan.create(
        config.privacy,
        rounds=config.rounds,
        fleet_size=config.fleet.devices or CHAT_USERS,
        cohort=config.fleet.sampled(config.fleet.cohort),
        seed=config.seed,
        rows=config.trainable.embedding_rows,
        vocabulary_size=config.vocabulary.size,
    )
    assert 0 < plan.epsilon(config.rounds) <= config.privacy.epsilon * (1 + 1e-4)
    ledger = plan.new_ledger()
    for number in range(1, config.rounds + 1):
        ledger.record(number, plan.sample_cohort(number))  # refuses a device that comes too early or too often
    assert ledger.separation >= config.privacy.min_separation


@pytest.mark.parametrize("name", FINETUNED)
def test_a_fine_tuning_recipe_keeps_its_budget(name: str) -> None:
    config = load_config({path.stem: path for path in ALL}[name], [])
    plan = make_plan(config, FINETUNED[name])
    assert config.finetune.example_dp.enabled
    assert not config.local.example_dp.enabled
    assert plan.num_steps == round(config.finetune.epochs * FINETUNED[name] / config.finetune.batch_size)
    assert 0 < plan.epsilon(plan.num_steps) <= config.finetune.example_dp.epsilon * (1 + 1e-4)
    assert plan.delta <= 1 / FINETUNED[name]
