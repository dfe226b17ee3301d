"""Everything that would make a per-example gradient wrong is refused, by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from brute_force import Inputs, SimpleTask, assert_exact, task_of
from torch import Tensor, nn

from fedlm.errors import ConfigError
from fedlm.example_dp.clip_rule import ClipRule
from fedlm.example_dp.engine import PerExampleEngine
from fedlm.example_dp.independence import check_independence

RULE = ClipRule("flat", 1.0)
X = torch.arange(24, dtype=torch.float32).cos().view(4, 6)


class Rows:
    """Examples out of tensors."""

    def __init__(self, **columns: Tensor) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def lengths(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.ones(len(indices), np.int64)

    def batch(self, indices: npt.NDArray[np.int64]) -> Inputs:
        return {name: tensor[torch.from_numpy(indices)] for name, tensor in self._columns.items()}


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class GemmaRMSNorm(nn.Module):
    eps = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)


class DoubledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.flip(0))


def plain(model: Any, batch: Inputs) -> Tensor:
    output: Tensor = model(batch["x"])
    return output.flatten(1).square().sum(1)


@pytest.mark.parametrize("module", [Scale(), GemmaRMSNorm(), DoubledLinear(6, 2), nn.Bilinear(6, 6, 2)])
def test_a_module_without_a_layer_hook(module: nn.Module) -> None:
    model = nn.ModuleDict({"inner": module})
    with pytest.raises(ConfigError, match=rf"'inner.weight' is in 'inner', a {type(module).__name__}; .*freeze it"):
        PerExampleEngine(task_of(model, plain))


def test_the_projection_of_multihead_attention() -> None:
    """Its module is never called, so a tap on it would see nothing."""
    model = nn.ModuleDict({"mixer": nn.MultiheadAttention(4, 2)})
    with pytest.raises(ConfigError, match=r"'mixer.out_proj.bias' is in 'mixer.out_proj'"):
        PerExampleEngine(task_of(model, plain, lambda name: "out_proj.bias" in name))


def test_a_parameter_of_two_modules() -> None:
    model = nn.ModuleDict({"rows": nn.Embedding(5, 6), "head": nn.Linear(6, 5, bias=False)})
    model["head"].weight = model["rows"].weight
    with pytest.raises(ConfigError, match=r"'rows.weight' is shared by 'rows.weight' and 'head.weight'"):
        PerExampleEngine(task_of(model, plain))


def test_a_module_at_two_paths_is_exact() -> None:
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(6, 1)).double()
    assert_exact(task_of(model, plain), {"x": X.double()})


@pytest.mark.parametrize("is_trained", [False, True])
def test_batch_norm_in_training_mode(is_trained: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    task = task_of(model, plain, lambda name: is_trained or name.startswith("0"))
    with pytest.raises(ConfigError, match="'1"):
        PerExampleEngine(task)
    if not is_trained:
        model.eval()
        engine = PerExampleEngine(task)
        engine.clipped({"x": X}, RULE)
        model.train()
        with pytest.raises(ConfigError, match=r"'1' \(BatchNorm1d\) mixes"):
            engine.clipped({"x": X}, RULE)


def test_half_precision_and_renormed_embeddings_and_foreign_tensors() -> None:
    with pytest.raises(ConfigError, match=r"'weight' is torch.bfloat16"):
        PerExampleEngine(task_of(nn.Linear(6, 2).bfloat16(), plain))
    with pytest.raises(ConfigError, match="max_norm"):
        PerExampleEngine(task_of(nn.Sequential(nn.Embedding(5, 6, max_norm=1.0)), plain))
    with pytest.raises(ConfigError, match=r"trained\['weight'\] is not the model's parameter"):
        PerExampleEngine(SimpleTask(nn.Linear(6, 2), plain, {"weight": torch.ones(2, 6)}))


def test_tokens_flattened_into_the_batch() -> None:
    def flattened(model: Any, batch: Inputs) -> Tensor:
        rows = model(batch["x"].reshape(-1, 2))
        return rows.view(4, -1).sum(1)

    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(ConfigError, match=r"module '0' was called with an input of shape \(12, 2\) in a batch of 4"):
        PerExampleEngine(task_of(model, flattened)).clipped({"x": X}, RULE)


def in_batch_negatives(model: Any, batch: Inputs) -> Tensor:
    states = model(batch["x"])
    return F.cross_entropy(states @ states.T, torch.arange(len(states)), reduction="none")


def batch_mean(model: Any, batch: Inputs) -> Tensor:
    losses = plain(model, batch)
    return losses.mean().expand(len(losses))


def detached_statistics(model: Any, batch: Inputs) -> Tensor:
    losses = plain(model, batch)
    return losses / losses.detach().mean()


def hidden_in_rounding(model: Any, batch: Inputs) -> Tensor:
    losses = plain(model, batch)
    return losses + 1e-9 * losses.mean()


@pytest.mark.parametrize("loss", [in_batch_negatives, batch_mean, detached_statistics, hidden_in_rounding])
def test_dependence_on_other_examples_is_found(loss: Any) -> None:
    task = task_of(nn.Sequential(nn.Linear(6, 3)), loss)
    with pytest.raises(ConfigError, match="one example's loss depends on the others"):
        check_independence(task, Rows(x=X), np.arange(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_independent_losses_pass_and_modes_are_restored(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5), nn.Linear(3, 3)).to(dtype).train()
    check_independence(task_of(model, plain), Rows(x=X.to(dtype)), np.array([3, 1]))
    assert all(module.training for module in model.modules())


def test_a_module_that_only_opacus_knows_is_still_checked() -> None:
    model = nn.ModuleDict({"scale": Scale()})
    check_independence(task_of(model, lambda m, batch: plain(m["scale"], batch)), Rows(x=X), np.arange(4))
    with pytest.raises(ConfigError, match="depends on the others"):
        check_independence(task_of(model, lambda m, batch: batch_mean(m["scale"], batch)), Rows(x=X), np.arange(4))


def test_a_trained_buffer() -> None:
    model = nn.Linear(6, 2)
    model.register_buffer("centre", torch.zeros(6))
    task = task_of(model, plain)
    task.trained = {**task.trained, "centre": model.get_buffer("centre")}
    with pytest.raises(ConfigError, match="trained tensor 'centre' is no parameter of the model"):
        check_independence(task, Rows(x=X), np.arange(2))
