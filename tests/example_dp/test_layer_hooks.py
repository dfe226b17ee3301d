"""Single layers: every shape of call, ghost norms next to gradients, and what float32 does to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from brute_force import Inputs, assert_exact, task_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlm.example_dp.clip_rule import SLACK
from fedlm.example_dp.layers.matrix import MatrixGradSampler, ghost_norms
from fedlm.models.layers import Positions

WIDE = 40


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic(model: Any, batch: Inputs) -> Tensor:
    output: Tensor = model(batch["x"])
    return output.flatten(1).square().sum(1)


def randomised(model: nn.Module) -> nn.Module:
    for i, parameter in enumerate(model.parameters()):
        parameter.data = 0.4 * states(*parameter.shape, seed=i)
    return model


@pytest.mark.parametrize("shape", [(3, 5), (3, 1, 5), (3, 2, 5), (3, 2, 4, 5), (2, 70, 5), (1, 5)])
def test_linear_and_norms_of_any_shape(shape: tuple[int, ...]) -> None:
    model = randomised(nn.Sequential(nn.Linear(5, WIDE), nn.LayerNorm(WIDE), nn.Tanh(), nn.Linear(WIDE, 6, bias=False),
                                     nn.RMSNorm(6), nn.LayerNorm(6, bias=False)))  # fmt: skip
    assert_exact(task_of(model, quadratic), {"x": states(*shape)})


def test_a_norm_over_several_dimensions() -> None:
    assert_exact(task_of(randomised(nn.LayerNorm((3, 4))), quadratic), {"x": states(2, 5, 3, 4)})


@settings(max_examples=25, deadline=None)
@given(B=st.integers(1, 4), T=st.integers(1, 50), rows=st.integers(1, 12), columns=st.integers(1, 12))
def test_conv1d_and_linear_on_both_sides_of_the_choice(B: int, T: int, rows: int, columns: int) -> None:
    from transformers.pytorch_utils import Conv1D

    model = randomised(nn.Sequential(Conv1D(columns, rows), nn.Tanh(), nn.Linear(columns, rows)))
    assert_exact(task_of(model, quadratic), {"x": states(B, T, rows)}, tolerance=1e-11)


@pytest.mark.parametrize("num_calls", [1, 2, 9, 40])
def test_a_module_called_many_times(num_calls: int) -> None:
    """Few calls keep inputs and gradients, many make the gradient and add to it."""

    def recurrent(model: Any, batch: Inputs) -> Tensor:
        x = batch["x"]
        for _ in range(num_calls):
            x = torch.tanh(model[0](x))
        return x.square().sum(1)

    assert_exact(task_of(randomised(nn.Sequential(nn.Linear(12, 12))), recurrent), {"x": states(3, 12)})


@pytest.mark.parametrize("is_flat", [False, True])
def test_position_ids_that_all_examples_share(is_flat: bool) -> None:
    def loss(model: Any, batch: Inputs) -> Tensor:
        ids = torch.arange(4)
        rows = model[0](ids if is_flat else ids[None])
        return model[1](batch["x"] + rows).square().sum((1, 2))

    model = randomised(nn.Sequential(nn.Embedding(6, 5), nn.Linear(5, 5)))
    assert_exact(task_of(model, loss), {"x": states(4, 4, 5)})


def test_positions_and_an_embedding_used_twice() -> None:
    def loss(model: Any, batch: Inputs) -> Tensor:
        ids = batch["ids"]
        return model["positions"](model["rows"](ids) * model["rows"](ids.flip(1))).square().sum((1, 2))

    model = randomised(nn.ModuleDict({"rows": nn.Embedding(6, 5, padding_idx=2), "positions": Positions(9, 5)}))
    ids = torch.tensor([[1, 1, 3, 2], [2, 2, 2, 2], [5, 0, 5, 0]])
    assert_exact(task_of(model, loss), {"ids": ids})


@pytest.mark.parametrize("is_leaf", [False, True])
def test_biases_behind_a_leaf_and_before_a_change_in_place(is_leaf: bool) -> None:
    """Neither what else has a gradient nor what becomes of a module's output may matter."""
    scale = torch.full((5,), 0.7, dtype=torch.float64, requires_grad=is_leaf)

    def loss(model: Any, batch: Inputs) -> Tensor:
        return quadratic(model, {"x": batch["x"] * scale})

    model = randomised(nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True)))
    assert_exact(task_of(model, loss, lambda name: name.endswith("bias")), {"x": states(3, 6, 5)})


def adversaries(T: int, d: int) -> dict[str, tuple[Tensor, Tensor]]:
    x, g = states(1, T, d).float(), states(1, T, d, seed=1).float()
    signs = torch.ones(1, T, 1)
    signs[:, 1::2] = -1
    same = x[:, :1].expand_as(x).contiguous()
    sizes = states(1, T, 1, seed=2).float().mul(3).exp()
    return {
        "random": (g, x),
        "all cancels": (g[:, :1] * signs, same),
        "nearly all cancels": (g[:, :1] * signs + 1e-4 * g, same),
        "centred": (g - g.mean(1, keepdim=True), same + 1e-3 * x),
        "very different lengths": (g * sizes, x / sizes.flip(1)),
    }


@pytest.mark.parametrize("case", adversaries(2, 1))
@pytest.mark.parametrize(("T", "d"), [(64, 256), (120, 256), (512, 1200)])
def test_norms_in_float32_stay_within_the_slack(case: str, T: int, d: int) -> None:
    """A norm that comes out too small would let an example beyond the bound; d is large enough for a ghost norm."""
    left, right = adversaries(T, d)[case]
    sampler = MatrixGradSampler("weight", nn.Parameter(torch.empty(d, d)), 1)
    sampler.receive(right, left)
    true = torch.linalg.vector_norm(left[0].double().T @ right[0].double())
    found = sampler.squared_norms().double().sqrt()
    reach = 1e-6 * torch.linalg.vector_norm(left, dim=2).mul(torch.linalg.vector_norm(right, dim=2)).sum()
    assert float(true) <= float(found) * (1 + SLACK) + (float(reach) if case == "all cancels" else 0)


def test_ghost_norms_alone_would_not_stay_within_the_slack() -> None:
    left, right = adversaries(512, 64)["nearly all cancels"]
    true = torch.linalg.vector_norm(left[0].double().T @ right[0].double()).square()
    squares, bound = ghost_norms(left, right)
    error = abs(float(squares) - float(true))
    assert error > SLACK * float(true)
    assert error <= 8 * torch.finfo(torch.float32).eps * float(bound)
