"""Noise levels from public numbers: against simulated training, the paper's formula, and themselves after storage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlm.codec import from_text, to_text
from fedlm.errors import DataError
from fedlm.models.re_attention.example_level import example_level_noise, probability_of_containing
from fedlm.models.re_attention.noise_levels import NoiseLevels, step_variance
from fedlm.models.re_attention.user_level import user_level_noise


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("noise_std", [1e-3, 2.0])
def test_step_variance_is_what_noise_alone_does_to_weights(optimizer: str, noise_std: float) -> None:
    """torch's own optimisers on pure noise: the variance over 20,000 coordinates grows as promised."""
    weights = torch.nn.Parameter(torch.zeros(20_000))
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    optimise = kinds[optimizer]([weights], lr=0.01)
    source = torch.Generator().manual_seed(1)
    for _ in range(300):
        weights.grad = noise_std * torch.randn(weights.shape, generator=source)
        optimise.step()
    predicted = 300 * step_variance(noise_std, 0.01, optimizer=optimizer)
    # Adam: its second moment still fluctuates with the coordinate at first, and the last steps' momentum is to come.
    assert float(weights.detach().var()) == pytest.approx(predicted, rel=0.05 if optimizer == "sgd" else 0.2)


def test_adam_moves_noise_less_where_there_is_signal() -> None:
    weights = torch.nn.Parameter(torch.zeros(5_000))
    optimise = torch.optim.Adam([weights], lr=0.01)
    source = torch.Generator().manual_seed(1)
    for _ in range(200):
        weights.grad = 1 + torch.randn(weights.shape, generator=source)
        optimise.step()
    assert float(weights.detach().var()) < 200 * step_variance(1.0, 0.01, optimizer="adam")


def test_no_noise_adds_no_variance() -> None:
    assert step_variance(0.0, 0.1, optimizer="adam") == step_variance(0.0, 0.1, optimizer="sgd") == 0
    with pytest.raises(DataError, match="'lion' is not known"):
        step_variance(1.0, 0.1, optimizer="lion")


def test_the_probability_of_containing_a_word_is_that_of_drawn_examples() -> None:
    f = np.array([5.0, 3.0, 1.9, 0.1])
    words = np.random.default_rng(1).choice(4, (40_000, 12), p=f / f.sum())
    found = [(words == i).any(axis=1).mean() for i in range(4)]
    np.testing.assert_allclose(probability_of_containing(f, 12), found, atol=0.01)
    assert probability_of_containing(np.array([0.0, 1.0]), 5).tolist() == [0, pytest.approx(1)]


def test_example_level_rows_follow_the_paper_or_are_all_the_same() -> None:
    p = np.array([1.0, 0.5, 0.01, 0.0])
    given = {"containing": p, "batch_size": 50.0}
    same = example_level_noise(2.0, {"a": 3.0}, kind="absolute", **given)  # type: ignore[arg-type]
    assert same.rows.tolist() == [2, 2, 2, 2]
    assert same.weights == {"a": 3}
    paper = example_level_noise(2.0, {"a": 3.0}, kind="per_frequency", **given)  # type: ignore[arg-type]
    assert paper.rows.tolist() == [2, 8, 5_000, 5_000]  # never less than one example of a batch
    with pytest.raises(DataError, match="'relative'"):
        example_level_noise(2.0, {}, kind="relative", **given)  # type: ignore[arg-type]


def test_user_level_absolute_rows_are_those_of_simulated_rounds() -> None:
    pi = np.array([1.0, 0.4, 0.1, 0.0])
    rng = np.random.default_rng(3)
    released = rng.random((30, 4, 5_000)) < pi[:, None]
    moved = (released * rng.normal(0, 0.2, released.shape)).sum(0)  # (V, draws)
    levels = user_level_noise(0.04, 30, frozenset({"a"}), inclusion=pi, kind="absolute")
    np.testing.assert_allclose(levels.rows, moved.var(1), rtol=0.1)
    assert levels.weights == {"a": pytest.approx(1.2)}
    unbiased = user_level_noise(0.04, 30, frozenset(), inclusion=pi, kind="per_frequency")
    np.testing.assert_allclose(unbiased.rows[:3], (moved / np.maximum(pi, 1e-9)[:, None]).var(1)[:3], rtol=0.1)
    assert unbiased.rows[3] == 0


def test_levels_survive_storage_and_refuse_nonsense() -> None:
    levels = NoiseLevels(np.array([0.5, 0.0], np.float32), {"a.weight": 1e-9})
    back = from_text(NoiseLevels, to_text(levels), where="stored noise levels")
    assert back.rows.tolist() == [0.5, 0.0]
    assert back.weights == levels.weights
    for rows, weights in (([-1.0], {}), ([np.nan], {}), ([1.0], {"a": -1.0}), ([[1.0]], {})):
        with pytest.raises(DataError, match="noise levels must be"):
            NoiseLevels(np.array(rows, np.float32), weights)
    with pytest.raises(DataError, match="stored noise levels is not JSON"):
        from_text(NoiseLevels, b"nothing", where="stored noise levels")
