"""DP-SGD on a device: plain SGD in the limit, bounded influence, noise on every coordinate, nothing else told."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedlm.config.load import load_config
from fedlm.config.schema import Config
from fedlm.errors import BudgetExceededError, ConfigError
from fedlm.example_dp.device_budget import DeviceBudget, device_budget
from fedlm.models.factory import build_model
from fedlm.privacy.accounting.subsampled_gaussian import epsilon
from fedlm.randomness import round_key
from fedlm.trainable.build import Trainable, build_trainable
from fedlm.training.dp_local import PrivateLocalTrainer
from fedlm.training.local import LocalResult, LocalTrainer

V, T, KEY = 60, 12, round_key(1, 1)
FREQUENCIES = 1 / np.arange(3.0, V + 3)
FREQUENCIES /= FREQUENCIES.sum()
TOKENS = np.random.default_rng(0).integers(3, V, 4 * T + 1).astype(np.int32)  # four whole sequences
ROWS = np.sort(np.random.default_rng(1).choice(V, 25, replace=False)).astype(np.int64)
BASE = [
    "vocabulary.size=60", "model.d_model=16", "model.num_layers=2", "model.num_heads=2", "pretrain.negatives=20",
    f"data.sequence_length={T}", "local.batch_size=4", "local.learning_rate=0.1", "local.row_learning_rate=0.1",
    "loss.negatives=20", "trainable.embedding_rows.count=25", "privacy.non_private_diagnostics=false",
    "local.example_dp.enabled=true", "local.example_dp.epsilon=8",
]  # fmt: skip
NO_NOISE, NO_CLIP = 1e-9, 1e3


def config(*overrides: str) -> Config:
    return load_config(None, [*BASE, *overrides])


def budget(z: float, clip_norm: float, *, q: float = 1.0, steps: int = 1) -> DeviceBudget:
    return DeviceBudget(q, z, steps, 1, 1e-5, clip_norm)


def train(c: Config, spend: DeviceBudget | None, tokens: np.ndarray = TOKENS) -> tuple[Trainable, LocalResult]:
    trainable = build_trainable(build_model(c, FREQUENCIES, c.seed), c)
    blocks = trainable.initial_blocks(copy_tables=False)
    trainable.bind_tables(blocks)
    trainer = (
        LocalTrainer(trainable, c, FREQUENCIES)
        if spend is None
        else PrivateLocalTrainer(trainable, c, FREQUENCIES, spend)
    )
    rows = ROWS if c.trainable.embedding_rows.count else ROWS[:0]
    trainer.start_round(trainable.spec.with_rows(rows), blocks)
    return trainable, trainer.train(tokens, key=KEY, device=3)


@pytest.mark.parametrize("loss", ["nce", "sampled_softmax", "full_softmax"])
@pytest.mark.parametrize("trains", ["trainable.bias=true", "trainable.embedding_rows.count=0"])
def test_with_all_sequences_no_clip_and_no_noise_a_step_is_that_of_plain_sgd(loss: str, trains: str) -> None:
    c = config(f"loss.kind={loss}", trains)
    _, plain = train(c, None)
    _, private = train(c, budget(NO_NOISE, NO_CLIP))
    largest = np.abs(plain.update).max()
    assert largest > 1e-5
    atol = 1e-6 if c.trainable.embedding_rows.count else 1e-3 * largest  # 1e-6: two steps of an output bias near -4
    np.testing.assert_allclose(private.update, plain.update, atol=atol)


def test_a_sequence_less_moves_the_update_by_at_most_its_clipped_share() -> None:
    c = config()
    _, all_four = train(c, budget(NO_NOISE, 0.02))
    _, three = train(c, budget(NO_NOISE, 0.02), TOKENS[: 3 * T + 1])
    moved = float(np.linalg.norm((all_four.update - three.update).astype(np.float64)))
    bound = c.local.learning_rate * 0.02 / c.local.batch_size
    assert 0.5 * bound < moved <= bound * (1 + 1e-4)


def test_without_text_the_update_is_noise_of_the_stated_size_on_every_coordinate() -> None:
    c = config()
    spend = budget(2.0, 0.5, q=0.5, steps=3)
    trainable, result = train(c, spend, TOKENS[:1])
    std = c.local.learning_rate * math.sqrt(3) * 2.0 * 0.5 / c.local.batch_size
    fixed = result.update[: trainable.spec.with_rows(ROWS).fixed_size]
    rows = result.update[len(fixed) :]
    for part in (fixed, rows):
        assert (part == 0).mean() < 1e-3  # a draw may be rounded to 0
        assert stats.kstest(part / std, "norm").pvalue > 1e-4
    _, again = train(c, spend, TOKENS[:1])
    assert (again.update != result.update).mean() > 0.99


def test_rows_that_the_text_lacks_are_as_noisy_as_others_and_the_result_tells_nothing_else() -> None:
    c = config()
    trainable, result = train(c, budget(1.0, 0.5))
    rows = trainable.spec.with_rows(ROWS).views(result.update)["input_table"]
    assert (rows == 0).mean() < 1e-3
    assert result.loss == 0
    assert result.num_tokens == 0


def test_reproducible_noise_follows_from_round_and_device() -> None:
    c = config("privacy.reproducible_noise=true")
    first, second = (train(c, budget(1.0, 0.5))[1].update for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_budget_covers_all_rounds_that_a_device_may_take_part_in() -> None:
    found = device_budget(config("rounds=9", "local.example_dp.max_rounds=3", "local.example_dp.steps=5"))
    assert found is not None
    spent = epsilon(sampling_probability=0.25, noise_multiplier=found.noise_multiplier, rounds=15, delta=1e-5)
    assert 7.9 < spent <= 8.001
    assert found.epsilon(3) == spent
    whole = device_budget(config("rounds=9"))
    assert whole is not None
    assert whole.max_rounds == 9
    assert "also against a server that keeps to the protocol" in found.guarantee().statement


def test_a_given_noise_that_costs_more_than_epsilon_is_refused() -> None:
    with pytest.raises(BudgetExceededError, match="max_rounds"):
        device_budget(config("local.example_dp.noise_multiplier=0.5"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("privacy.non_private_diagnostics", "true"),
        ("trainable.embedding_rows.sampler", "dp_adafest"),
        ("loss.negatives_from", "rows"),
        ("privacy.metrics", "['train_loss']"),
        ("fleet.profile", "phones"),
        ("local.example_dp.engine", "opacus"),
        ("local.example_dp.epsilon", "0"),
    ],
)
def test_what_would_break_the_devices_guarantee_is_refused_with_its_fix(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match="example_dp"):
        config("loss.negatives=10", f"{key}={value}")
