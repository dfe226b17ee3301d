"""Every recipe that ships is a valid config whose plan can do all its rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlm.config import load_config
from fedlm.privacy import PrivacyPlan

RECIPES = sorted((Path(__file__).resolve().parents[2] / "simulations" / "recipes").glob("*.toml"))
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
