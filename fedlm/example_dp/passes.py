"""One forward and one backward pass of a task with its modules tapped; the engine and the checks share it.

Legend: B examples of a physical batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlm.errors import ConfigError
from fedlm.example_dp.layers.hooks import Taps
from fedlm.example_dp.per_example_gradients import Tape
from fedlm.example_dp.task import BatchT, Task


def differentiate(task: Task[BatchT], batch: BatchT, taps: Taps, *, only: int | None = None) -> tuple[Tape, Tensor]:
    """Return the tape, complete, and the losses (B,), detached.

    The backward pass goes down to the lowest tap and computes nothing else: no parameter of the model gets a `grad`.

    Arguments:
        task: What to run.
        batch: Of B examples.
        taps: Of the task's model.
        only: Differentiate the loss of this example alone.

    Raises:
        ConfigError: The task does not give one loss for each example.
    """
    tape = Tape(task.num_examples(batch))
    with torch.enable_grad(), taps.on(tape):
        losses = checked_losses(task.losses(batch, tape), tape.num_examples)
        if losses.requires_grad:
            weights = torch.ones_like(losses)  # (B,)
            if only is not None:
                weights.zero_()[only] = 1
            torch.autograd.grad(losses, [tape.trigger], weights, allow_unused=True)
    return tape, losses.detach()


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
def total_norms(tape: Tape) -> Tensor:
    """Return the norm of each example's whole gradient, (B,) float64, after the backward pass."""
    total = torch.zeros(tape.num_examples, dtype=torch.float64)
    for contribution in tape.contributions:
        total += contribution.squared_norms().double().cpu()
    return total.sqrt()
