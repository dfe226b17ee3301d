"""One example at a time, differentiated by autograd: what every engine is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedlm.example_dp.clip_rule import ClipRule
from fedlm.example_dp.engine import ClippedGradients, PerExampleEngine
from fedlm.example_dp.per_example_gradients import PerExampleGradients
from fedlm.example_dp.task import Task

Inputs = dict[str, Tensor]


@dataclass
class SimpleTask(Task[Inputs]):
    """Any module and any function of it that gives one loss for each example."""

    model: nn.Module
    loss: Callable[[nn.Module, Inputs], Tensor]
    trained: Mapping[str, Tensor] = field(default_factory=dict)

    def num_examples(self, batch: Inputs) -> int:
        return len(next(iter(batch.values())))

    def losses(self, batch: Inputs, per_example: PerExampleGradients) -> Tensor:
        return self.loss(self.model, batch)


def task_of(
    model: nn.Module, loss: Callable[[nn.Module, Inputs], Tensor], chosen: Callable[[str], bool] = lambda name: True
) -> SimpleTask:
    return SimpleTask(model, loss, {name: p for name, p in model.named_parameters() if chosen(name)})


def one_by_one(task: SimpleTask, batch: Inputs) -> list[dict[str, Tensor]]:
    """The gradient of each example alone."""
    gradients = []
    before = {name: p.requires_grad for name, p in task.model.named_parameters()}
    for parameter in task.trained.values():
        parameter.requires_grad_(True)
    for i in range(task.num_examples(batch)):
        loss = task.loss(task.model, {name: tensor[i : i + 1] for name, tensor in batch.items()})
        found = torch.autograd.grad(loss.sum(), list(task.trained.values()), allow_unused=True)
        pairs = zip(task.trained.items(), found, strict=True)
        gradients.append({name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs})
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(before[name])
    return gradients


def norms_of(gradients: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([torch.cat([g.flatten() for g in one.values()]).double().norm() for one in gradients])


def assert_exact(task: SimpleTask, batch: Inputs, tolerance: float = 1e-12) -> ClippedGradients:
    """Compare norms and clipped sums for two rules, one of which clips about half of the examples."""
    gradients = one_by_one(task, batch)
    wanted_norms = norms_of(gradients)  # (B,)
    engine = PerExampleEngine(task)
    for rule in (ClipRule("flat", float(wanted_norms.median()) + 1e-9), ClipRule("automatic", 0.3)):
        found = engine.clipped(batch, rule)
        torch.testing.assert_close(found.norms, wanted_norms, rtol=tolerance, atol=tolerance)
        assert found.sums.keys() == task.trained.keys()
        factors = rule.factors(wanted_norms)
        for name, parameter in task.trained.items():
            wanted = sum(f * one[name] for f, one in zip(factors, gradients, strict=True))
            assert isinstance(wanted, Tensor)
            assert found.sums[name].shape == parameter.shape
            scale = float(wanted.abs().max()) + 1e-3
            error = float((found.sums[name] - wanted).abs().max())
            assert error <= tolerance * scale, f"{name}: {error} of {scale}"
    return found
