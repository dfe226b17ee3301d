"""The tracker adds up what each tensor's own steps added, over phases, and leaves other models alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlm.models.re_attention.example_level import NoiseTracker
from fedlm.models.transformer import TransformerModel

FREQUENCIES = np.array([8.0, 4.0, 2.0, 1.0, 1.0])


def small(*, re_attention: bool) -> TransformerModel:
    model = TransformerModel(5, 8, d_model=8, num_layers=1, num_heads=1, d_ff=8, re_attention=re_attention)
    model.initialise(torch.zeros(5), torch.Generator().manual_seed(1))
    return model


def test_phases_add_up_tensor_by_tensor() -> None:
    model = small(re_attention=True)
    tracker = NoiseTracker(model, FREQUENCIES, num_tokens=4, batch_size=10, kind="absolute")
    weight, bias = "blocks.0.mlp.up.weight", "blocks.0.mlp.up.bias"
    for _ in range(3):
        tracker.after_step(
            ["input_table", "output_bias", weight, bias], noise_std=0.5, learning_rate=0.1, optimizer="sgd"
        )
    tracker.after_step([bias], noise_std=0.5, learning_rate=0.2, optimizer="sgd", num_steps=5)
    levels = model.noise_levels
    assert levels is not None
    assert levels.weights == pytest.approx({weight: 3 * 0.05**2, bias: 3 * 0.05**2 + 5 * 0.1**2})
    assert levels.rows.tolist() == pytest.approx([3 * 0.05**2] * 5)
    assert model.hidden(torch.tensor([[0, 3, 4]])).isfinite().all()


def test_rarer_rows_are_noisier_per_frequency() -> None:
    model = small(re_attention=True)
    tracker = NoiseTracker(model, FREQUENCIES, num_tokens=4, batch_size=10, kind="per_frequency")
    tracker.after_step(["input_table"], noise_std=1.0, learning_rate=1.0, optimizer="sgd")
    assert model.noise_levels is not None
    containing = 1 - (1 - FREQUENCIES / 16) ** 4
    np.testing.assert_allclose(model.noise_levels.rows, containing**-2, rtol=1e-5)


def test_frozen_rows_are_exact_and_a_model_without_the_option_is_left_alone() -> None:
    for re_attention in (True, False):
        model = small(re_attention=re_attention)
        tracker = NoiseTracker(model, FREQUENCIES, num_tokens=4, batch_size=10, kind="absolute")
        tracker.after_step(["norm.bias"], noise_std=1.0, learning_rate=1.0, optimizer="adam")
        levels = model.noise_levels
        assert (levels is not None) == re_attention
        assert levels is None or not levels.rows.any()
