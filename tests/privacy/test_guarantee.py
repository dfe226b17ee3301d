"""Users, examples and devices' sequences: one kind of guarantee, one way to print it, one rule for its budget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedlm.config.load import load_config
from fedlm.config.schema import ExampleDpConfig, PrivacyConfig
from fedlm.errors import BudgetExceededError
from fedlm.example_dp.device_budget import DeviceBudget, device_budget
from fedlm.example_dp.plan import ExamplePlan
from fedlm.export.model_card import write_model_card
from fedlm.privacy.guarantee import Guarantee, check_budget, to_dict, to_lines
from fedlm.privacy.plan import PrivacyPlan
from fedlm.privacy.released_once import ReleasedOnce
from fedlm.rounding import rounded_up

ON_DEVICES = ("local.example_dp.enabled=true", "privacy.non_private_diagnostics=false", "rounds=3")


def users(*, noise: float = 1.0, epsilon: float = 0.0, enabled: bool = True, debugging: bool = False) -> PrivacyPlan:
    config = PrivacyConfig(enabled=enabled, noise_multiplier=noise, epsilon=epsilon, reproducible_noise=debugging)
    return PrivacyPlan.create(config, rounds=10, fleet_size=2_000, cohort=50, seed=1)


def examples(*, noise: float = 1.0, epsilon: float = 0.0, enabled: bool = True, debugging: bool = False) -> ExamplePlan:
    config = ExampleDpConfig(enabled=enabled, noise_multiplier=noise, epsilon=epsilon, delta=1e-5)
    return ExamplePlan.create(config, num_examples=1_000, batch_size=50, steps=(10,), reproducible=debugging)


def devices(*, noise: float = 1.0, epsilon: float = 0.0, debugging: bool = False) -> DeviceBudget:
    own = (f"local.example_dp.noise_multiplier={noise}", f"local.example_dp.epsilon={epsilon}")
    found = device_budget(load_config(None, [*ON_DEVICES, *own, f"privacy.reproducible_noise={debugging}".lower()]))
    assert found is not None
    return found


PLANS: dict[str, Callable[[], PrivacyPlan | ExamplePlan | DeviceBudget]] = {
    "users": users,
    "users, debugging": lambda: users(debugging=True),
    "users, not private": lambda: users(enabled=False, noise=0.0),
    "examples": examples,
    "examples, debugging": lambda: examples(debugging=True),
    "examples, not private": lambda: examples(enabled=False),
    "devices": devices,
    "devices, debugging": lambda: devices(debugging=True),
}


@pytest.mark.parametrize("name", PLANS)
def test_text_and_figures_say_the_same_of_every_plan(name: str, tmp_path: Path) -> None:
    guarantee = PLANS[name]().guarantee()
    verdicts = [] if "," not in name else ["NOT PRIVATE"]
    assert [warning.partition(":")[0] for warning in guarantee.warnings] == verdicts
    headline, *lines = to_lines(guarantee)
    assert " ".join(lines) == guarantee.statement
    assert headline.endswith("[NOT PRIVATE]") == bool(verdicts)
    figures = json.loads(json.dumps(to_dict(guarantee), allow_nan=False))
    assert figures["privacy_statement"] == guarantee.statement
    assert figures["stamps"] == list(guarantee.warnings)
    assert all(f"{warning}." in lines for warning in guarantee.warnings)
    if name.endswith("not private"):
        assert (guarantee.sentences, figures["epsilon"], guarantee.epsilon) == ((), None, math.inf)
        assert headline.startswith("no finite epsilon")
    else:
        printed = f"epsilon {rounded_up(guarantee.epsilon)} at delta 1e-0"
        assert headline.startswith(printed)
        assert printed in guarantee.sentences[0]
        assert guarantee.unit in guarantee.sentences[0]
        assert guarantee.adjacency in guarantee.sentences[0]
        assert figures["epsilon"] == guarantee.epsilon
    write_model_card(tmp_path, guarantee)
    assert json.loads((tmp_path / "privacy.json").read_text()) == figures
    card = (tmp_path / "README.md").read_text()
    assert all(line in card for line in (headline, *lines))


def test_a_further_warning_stands_everywhere_and_changes_nothing_else() -> None:
    plain = users().guarantee()
    warned = plain.warned("PER DEVICE: copies")
    assert replace(warned, warnings=plain.warnings) == plain
    assert to_lines(warned)[0] == f"{to_lines(plain)[0]} [PER DEVICE]"
    assert warned.statement == f"{plain.statement} PER DEVICE: copies."
    assert to_dict(warned)["stamps"] == ["PER DEVICE: copies"]


@pytest.mark.parametrize("make", [users, examples, devices])
def test_noise_that_costs_more_than_its_budget_is_refused_by_every_plan(
    make: Callable[..., PrivacyPlan | ExamplePlan | DeviceBudget],
) -> None:
    spent = make(noise=1.0).guarantee().epsilon
    assert make(noise=1.0, epsilon=spent).guarantee().epsilon == spent
    assert make(noise=1.0, epsilon=spent * (1 - 5e-5)).guarantee().epsilon == spent  # the accountant's fourth digit
    with pytest.raises(BudgetExceededError, match=rf"costs epsilon {rounded_up(spent)}, allowed is .*; set ") as caught:
        make(noise=1.0, epsilon=spent * (1 - 2e-4))
    assert "\n" not in str(caught.value)


def test_no_budget_refuses_nothing_and_no_guarantee_keeps_none() -> None:
    check_budget(math.inf, 0.0, what="nothing", fix="nothing")
    with pytest.raises(BudgetExceededError, match="costs epsilon infinity, allowed is 8"):
        check_budget(math.inf, 8.0, what="no noise", fix="add some")


def test_a_release_is_claimed_once_and_no_more_often_than_is_paid_for() -> None:
    released = ReleasedOnce("step")
    released.claim(5, most=2)
    with pytest.raises(BudgetExceededError, match="step 5 was already released"):
        released.claim(5, most=2)
    released.claim(0, most=2)
    with pytest.raises(BudgetExceededError, match="all 2 planned steps were released"):
        released.claim(1, most=2)
    released.claim(1)


def test_a_guarantee_is_a_value() -> None:
    one = Guarantee("user", "add or remove one", 2.0, 1e-6, ("It holds.",))
    assert one == Guarantee("user", "add or remove one", 2.0, 1e-6, ("It holds.",))
    assert one != one.warned("NOT PRIVATE: a seed")
