"""Exact clipped gradients in one forward and one backward pass (book-keeping; Bu et al. 2022, arXiv 2210.00038).

Legend: B examples of a physical batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from fedlm.errors import ConfigError
from fedlm.example_dp.clip_rule import ClipRule
from fedlm.example_dp.layers.hooks import LayerHooks
from fedlm.example_dp.per_example_gradients import PerExampleGradients
from fedlm.example_dp.refusals import batch_norms, refuse_batch_statistics, watched_modules
from fedlm.example_dp.task import BatchT, Task


@dataclass(frozen=True)
class ClippedGradients:
    """What one physical batch adds to a step.

    Arguments:
        sums: `sum_i factor_i g_i` of everything that trains, by name, in its shape.
        norms: Each example's gradient norm before clipping, (B,) float64; private, like all that follows.
        losses: (B,).
        num_clipped: Examples with a norm over the bound.
        num_rejected: Examples whose gradient is not finite; they add nothing.
    """

    sums: dict[str, Tensor]
    norms: Tensor
    losses: Tensor
    num_clipped: int
    num_rejected: int

    @classmethod
    def of(cls, sums: dict[str, Tensor], norms: Tensor, losses: Tensor, rule: ClipRule) -> ClippedGradients:
        """Return the result with its counts."""
        finite = torch.isfinite(norms)  # (B,)
        num_clipped = int(((norms > rule.clip_norm) & finite).sum())
        return cls(sums, norms, losses, num_clipped, int((~finite).sum()))


class PerExampleEngine(Generic[BatchT]):
    """Computes clipped gradients of a task.

    Guarantee: what one example adds to `sums` has an L2 norm of at most `rule.clip_norm` over all tensors together, and
    no other example changes it. This rests on the task: each loss depends on its own example alone
    (`independence.check_independence` tests that).

    Edge cases: an example with an infinite or undefined gradient adds zero; a module that was not called, and a trained
    parameter used outside its own module's call, have gradient zero. The model, the `grad` and the `requires_grad` of
    its parameters are left as they were.

    Arguments:
        task: Its trained tensors may change between passes, in place.

    Raises:
        ConfigError: A trained parameter that no tap can follow, or batch statistics; it names the module.
    """

    def __init__(self, task: Task[BatchT]) -> None:
        self._task = task
        self._layer_hooks = LayerHooks(task.model, watched_modules(task.model, task.trained))
        self._batch_norms = batch_norms(task.model)
        refuse_batch_statistics(self._batch_norms)

    def clipped(self, batch: BatchT, rule: ClipRule) -> ClippedGradients:
        """Return the clipped sums of one physical batch.

        Raises:
            ConfigError: A module that was called with another first dimension than the examples'; losses of another
                shape than (B,); batch statistics.
        """
        refuse_batch_statistics(self._batch_norms)
        per_example, losses = differentiate(self._task, batch, self._layer_hooks)
        norms = total_norms(per_example)  # (B,)
        sums = _weighted_sums(per_example, rule.factors(norms).to(losses), self._task.trained)
        return ClippedGradients.of(sums, norms, losses, rule)


@torch.no_grad()
def _weighted_sums(
    per_example: PerExampleGradients, factors: Tensor, trained: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the sums of all that trains, zeros where nothing was contributed; empties the per-example gradients."""
    sums: dict[str, Tensor] = {}
    while per_example.contributions:  # each frees its memory as it goes
        for name, part in per_example.contributions.pop().weighted_sums(factors).items():
            assert name not in sums, f"two contributions to {name}: its norm lacks what they have in common"
            sums[name] = part
    assert sums.keys() <= trained.keys(), f"contributions to {sums.keys() - trained.keys()}, which do not train"
    return {name: sums[name] if name in sums else torch.zeros_like(t.detach()) for name, t in trained.items()}


def differentiate(
    task: Task[BatchT], batch: BatchT, layer_hooks: LayerHooks, *, only: int | None = None
) -> tuple[PerExampleGradients, Tensor]:
    """Return the per-example gradients, complete, and the losses (B,), detached.

    The backward pass goes down to the lowest tap and computes nothing else: no parameter of the model gets a `grad`.

    Arguments:
        task: What to run.
        batch: Of B examples.
        layer_hooks: Of the task's model.
        only: Differentiate the loss of this example alone.

    Raises:
        ConfigError: The task does not give one loss for each example.
    """
    per_example = PerExampleGradients(task.num_examples(batch))
    with torch.enable_grad(), layer_hooks.on(per_example):
        losses = checked_losses(task.losses(batch, per_example), per_example.num_examples)
        if losses.requires_grad:
            weights = torch.ones_like(losses)  # (B,)
            if only is not None:
                weights.zero_()[only] = 1
            torch.autograd.grad(losses, [per_example.trigger], weights, allow_unused=True)
    return per_example, losses.detach()


def checked_losses(losses: Tensor, num_examples: int) -> Tensor:
    """Return the losses, which must be one for each example.

    Raises:
        ConfigError: They are not.
    """
    if losses.shape != (num_examples,):
        raise ConfigError(
            f"the task's losses have shape {tuple(losses.shape)} for {num_examples} examples; return one loss for "
            "each example, without a mean over the batch"
        )
    return losses


@torch.no_grad()
def total_norms(per_example: PerExampleGradients) -> Tensor:
    """Return the norm of each example's whole gradient, (B,) float64, after the backward pass."""
    total = torch.zeros(per_example.num_examples, dtype=torch.float64)
    for contribution in per_example.contributions:
        total += contribution.squared_norms().double().cpu()
    return total.sqrt()
