"""Every switch of a config does what it says: it trains, changes the model, and costs the payload that it must."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tiny_fedlm import Fedlm, one_line

OFF = "privacy.enabled=false"
NO_LORA, NO_ROWS = "trainable.lora.rank=0", "trainable.embedding_rows.count=0"

# One transformer layer of width 32: qkv 32 -> 96, output 32 -> 32, up 32 -> 128, down 128 -> 32.
LORA = 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
LORA_B = 4 * (96 + 32 + 128 + 32)
BIAS = 96 + 32 + 128 + 32 + 3 * 32  # linear layers and three norms
BODY = (32 * 96 + 32 * 32 + 32 * 128 + 128 * 32) + BIAS + 3 * 32 + 16 * 32  # norms' weights, positions
ROW, UNTIED_ROW = 32 + 1, 2 * 32 + 1


@pytest.mark.parametrize(
    ("overrides", "coordinates"),
    [
        (["loss.kind=nce"], LORA + 300 * ROW),
        (["loss.kind=sampled_softmax"], LORA + 300 * ROW),
        (["loss.kind=full_softmax"], LORA + 300 * ROW),
        (["loss.negatives_from=rows"], LORA + 300 * ROW),
        (["trainable.embedding_rows.sampler=uniform"], LORA + 300 * ROW),
        (["trainable.embedding_rows.sampler=top_k"], LORA + 300 * ROW),
        (["trainable.embedding_rows.sampler=cyclic"], LORA + 300 * ROW),
        (["trainable.embedding_rows.count=2000"], LORA + 2000 * ROW),
        ([NO_LORA], 300 * ROW),
        ([NO_ROWS], LORA),
        ([NO_ROWS, "trainable.lora.freeze_a=true"], LORA_B),
        ([NO_ROWS, NO_LORA, "trainable.bias=true"], BIAS),
        ([NO_ROWS, NO_LORA, "trainable.dense=['*']"], BODY),
        ([NO_ROWS, NO_LORA, "trainable.dense=['norm.*']"], 64),
        ([NO_ROWS, "trainable.dense=['*']", "trainable.bias=true"], LORA + BODY),
        (["model.tied=false"], LORA + 300 * UNTIED_ROW),
        (["model.base=random", "trainable.dense=['*']"], LORA + BODY + 300 * ROW),
        (["model.dropout=0.3"], LORA + 300 * ROW),
        (["model.name=lstm", "trainable.lora.targets=['recurrent']"], None),
        (["model.name=lstm", "model.tied=false", NO_LORA], 300 * UNTIED_ROW),
        (["strategy.kind=fedavg", "strategy.learning_rate=1.0"], LORA + 300 * ROW),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_setting_trains_and_costs_its_payload(here: Fedlm, overrides: list[str], coordinates: int | None) -> None:
    done = here(OFF, *overrides)
    figures = done.summary
    assert figures["rounds"] == 2
    assert figures["devices_trained"] > 0
    assert not [line for line in done.lines("ledger.jsonl") if line["event"] == "device_failed"]
    assert math.isfinite(figures["perplexity"])
    assert figures["perplexity"] != figures["perplexity_initial"]
    assert figures["epsilon"] is None
    assert done.error == "warning: NOT PRIVATE: privacy.enabled is false, updates are neither clipped nor noised\n"
    if coordinates is not None:
        assert figures["bytes_up_per_device"] == 4 * coordinates


def test_epsilon_and_noise_multiplier_are_two_sides_of_one_account(here: Fedlm, tmp_path: Path) -> None:
    calibrated = here("privacy.epsilon=3")
    assert calibrated.summary["epsilon"] == pytest.approx(3, rel=1e-3)
    noise = json.loads((calibrated.folder / "plan.json").read_text())["noise_multiplier"]
    calibrated.folder.rename(tmp_path / "first")
    given = here("privacy.epsilon=0", f"privacy.noise_multiplier={noise}")
    assert given.summary["epsilon"] == pytest.approx(calibrated.summary["epsilon"], rel=1e-6)


def test_a_budget_that_the_noise_does_not_keep_is_refused(here: Fedlm) -> None:
    """Exit code 3 and nothing done: with both given, epsilon is the budget of the noise multiplier."""
    done = here("privacy.epsilon=1", "privacy.noise_multiplier=0.5", "data.cache_dir=untouched")
    one_line(done, 3, "noise multiplier 0.5", "allowed is 1", "set privacy.noise_multiplier = 0")
    assert not done.folder.exists()
    assert not (done.folder.parent / "untouched" / "bases").exists()
    kept = here("privacy.epsilon=1", "privacy.noise_multiplier=20")
    assert 0 < kept.summary["epsilon"] < 1


def test_a_claimed_population_is_stamped(here: Fedlm) -> None:
    done = here("privacy.population=1000000", "privacy.expected_cohort=5000")
    assert done.summary["epsilon"] == pytest.approx(2, rel=1e-3)
    assert "no guarantee for this model" in done.error


def test_a_cohort_that_diverges_is_said_aloud(here: Fedlm) -> None:
    done = here(OFF, "local.learning_rate=1e4", "local.row_learning_rate=1e4", "local.epochs=3")
    assert done.summary["devices_trained"] == 0
    assert "none of" in done.error
    assert "lower local.learning_rate" in done.error


def test_what_only_the_model_can_refuse_is_refused_before_a_base_is_trained(here: Fedlm) -> None:
    done = here("trainable.dense=['nothing*']", "data.cache_dir=empty_cache")
    one_line(done, 2, "'nothing*' matches no tensor")
    assert not (done.folder.parent / "empty_cache" / "bases").exists()
    assert not done.folder.exists()
