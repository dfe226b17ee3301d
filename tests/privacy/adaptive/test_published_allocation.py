"""Less noise on important groups under one clip: what it costs, and that a plan accounts for exactly that."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.published_allocation import NOMINAL, true_epsilon
from fedlm.config.schema import PrivacyConfig
from fedlm.privacy import PrivacyPlan
from fedlm.privacy.adaptive.rule import AdaptiveState
from fedlm.privacy.clipping.clipped_sum import new_sum
from fedlm.trainable.spec import UpdateSpec

PAGE = Path(__file__).resolve().parents[3] / "docs" / "noise_allocation.md"
SPEC = UpdateSpec.build([("A", "lora_a", (30_000,)), ("table", "rows", (10_000, 2)), ("B", "lora_b", (30_000,))])


@pytest.mark.parametrize(("ratio", "expected"), [(0.8, 3.96), (0.5, 19.4)])
def test_noise_that_is_less_somewhere_costs_what_the_least_costs(ratio: float, expected: float) -> None:
    assert true_epsilon(2.0, ratio) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("ratio", [0.8, 0.5])
def test_the_page_prints_what_the_script_computes(ratio: float) -> None:
    row = re.search(rf"^\| {ratio:g} \|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    assert row, f"no row for {ratio} in {PAGE.name}"
    printed = [float(cell) for cell in row[1].split("|")]
    assert printed == pytest.approx([true_epsilon(nominal, ratio) for nominal in NOMINAL], rel=0.05)


def test_an_attacker_who_looks_at_the_quiet_group_breaks_the_nominal_delta() -> None:
    """One sampled round, integrated directly: the whole update of a user lies in a group with half the noise."""
    q, z, epsilon = 0.005, 0.867, 0.05
    step = 1e-4
    seen = np.arange(-12, 13, step)  # the released coordinate, in clip norms

    def delta(std: float) -> float:
        without = np.exp(-0.5 * (seen / std) ** 2) / (std * np.sqrt(2 * np.pi))
        with_user = (1 - q) * without + q * np.exp(-0.5 * ((seen - 1) / std) ** 2) / (std * np.sqrt(2 * np.pi))
        return float(np.maximum(with_user - np.exp(epsilon) * without, 0).sum() * step)

    assert delta(0.5 * z) > 2 * delta(z) > 0


def plan(**options: object) -> PrivacyPlan:
    config = PrivacyConfig(clip_norm=1.0, allocation="published", epsilon=2.0, delta=1e-6, **options)  # type: ignore[arg-type]
    return PrivacyPlan.create(config, rounds=2_000, fleet_size=20_000, cohort=100, seed=1)


def test_a_plan_accounts_for_the_least_noise_and_says_what_the_paper_would_claim() -> None:
    made = plan(noise_floor=0.5)
    assert made.epsilon(2_000) == pytest.approx(2.0, rel=1e-3)
    assert made.epsilon_as_published is not None
    assert made.epsilon_as_published < 0.6, "what true epsilon 2 would be sold as"
    assert any("allocated as published" in stamp for stamp in made.guarantee().warnings)


def test_every_group_of_a_release_has_at_least_the_accounted_noise() -> None:
    made = plan(noise_floor=0.5)
    state = made.first_state(SPEC)
    assert state.allocation is not None
    learnt = replace(state.allocation, sensitivity=(1.0, 0.1, 0.05), uncertainty=(1.0, 1.0, 1.0), num_rounds=100)
    clip_spec = made.clip_spec(AdaptiveState(state.clip_norm, learnt), SPEC, 1)
    released = made.release(new_sum(clip_spec, SPEC.size), 1)  # of an empty cohort: noise alone
    stds = np.array([block.view(released.mean).std() for block in SPEC.blocks]) / released.noise_std
    # 1 / importance is 1, 10 and 20, its root mean square over coordinates sqrt(175); the bound holds the first.
    expected = 2 * np.array([0.5, 10 / 175**0.5, 20 / 175**0.5])
    np.testing.assert_allclose(stds, expected, rtol=0.02)
    assert expected.min() == 1, "the accounted noise"
