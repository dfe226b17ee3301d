"""Linear modules: tokens that cancel, and sizes at which Gram matrices underflow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedlm.example_dp.clip_rule import ClipRule
from fedlm.example_dp.layers.matrix import MatrixGradSampler


def _share(gradient: Tensor, x: Tensor) -> float:
    """Return how long the first example's share of a clipped sum is, at clip norm 1."""
    sampler = MatrixGradSampler("w", nn.Parameter(torch.zeros(gradient.shape[2], x.shape[2])), len(x))
    sampler.receive(x, gradient)
    factors = ClipRule("flat", 1.0).factors(sampler.squared_norms().double().sqrt()).float()
    factors[1:] = 0
    return float(sampler.weighted_sums(factors)["w"].double().norm())


def test_gram_matrices_that_underflow_do_not_hide_a_gradient() -> None:
    x, gradient = torch.full((2, 200, 256), 1e18), torch.full((2, 200, 1024), 2.6e-23)  # squares below float32's
    assert 0.9 < _share(gradient, x) <= 1


@pytest.mark.parametrize("seed", range(3))
def test_tokens_that_cancel_stay_below_the_clip_norm(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 1e-3 * torch.randn(2, 32, 256, generator=generator) + 1e5 * torch.randn(2, 1, 256, generator=generator)
    gradient = torch.randn(2, 32, 256, generator=generator)
    assert _share(gradient - gradient.mean(1, keepdim=True), x) <= 1
