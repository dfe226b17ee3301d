"""Does one example's loss depend on the others? Then its clip bounds nothing.

Legend: B examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedlm.errors import ConfigError
from fedlm.example_dp.engine import differentiate, total_norms
from fedlm.example_dp.layers.hooks import LayerHooks, Watched
from fedlm.example_dp.refusals import watched_modules
from fedlm.example_dp.task import BatchT, Examples, Task

_MOST_EXAMPLES = 3
_LEAST_GRADIENT = 1e-12  # relative; of another example it is exactly 0 as a rule
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Relative, of losses: a batch is padded to its longest example and its products run in another order."""


def check_independence(task: Task[BatchT], examples: Examples[BatchT], indices: npt.NDArray[np.int64]) -> None:
    """Refuse a task in which one example's loss depends on the others; tried on the first few examples.

    Two tests in evaluation mode: the losses in a batch are those of each example alone, and the loss of one example has
    no gradient at the activations of another. The second finds what is still too small to change a loss.

    Guarantee: whether a correct task passes does not hang on one example. Losses must differ for two of them, because
    rounding can make them differ for an extreme one; the gradient that the second test looks for is exactly zero.

    Arguments:
        task: What to check.
        examples: The data.
        indices: At least two examples.

    Raises:
        ConfigError: In-batch negatives, batch statistics, a mean over the batch; or a trained tensor that is no
            parameter of the model and to which the task contributes nothing.
    """
    chosen = indices[:_MOST_EXAMPLES]
    assert len(chosen) >= 2, "one example cannot depend on another"
    with _evaluation(task.model):
        together = _check_gradients(task, examples.batch(chosen))
        unhooked = LayerHooks(task.model, [])
        alone = [differentiate(task, examples.batch(chosen[i : i + 1]), unhooked)[1] for i in range(len(chosen))]
    found = torch.cat(alone)  # (B,)
    both_bad = ~torch.isfinite(together) & ~torch.isfinite(found)
    tolerance = _TOLERANCE.get(together.dtype, 1e-2) * (1 + found.abs())
    differ = ~((together - found).abs().le(tolerance) | both_bad)  # (B,)
    if int(differ.sum()) >= 2:
        raise ConfigError(_message("its loss in a batch is not its loss alone"))


def _check_gradients(task: Task[BatchT], batch: BatchT) -> Tensor:
    """Return the losses (B,) of a batch in which one of them has been differentiated."""
    per_example, losses = differentiate(task, batch, LayerHooks(task.model, _watched(task)), only=0)
    norms = total_norms(per_example)  # (B,)
    if bool((norms[1:] > _LEAST_GRADIENT * norms[0]).any()):
        raise ConfigError(_message("it has a gradient at the activations of another example"))
    parameters = {name for name, _ in task.model.named_parameters(remove_duplicate=False)}
    reached: set[str] = set()
    for contribution in per_example.contributions:
        reached |= contribution.weighted_sums(torch.ones_like(losses)).keys()
    if lost := sorted(task.trained.keys() - parameters - reached):
        raise ConfigError(
            f"trained tensor '{lost[0]}' is no parameter of the model (a buffer?) and the task adds nothing to the "
            "per-example gradients for it; leave it out of `trained`, or make it a parameter"
        )
    return losses


def _watched(task: Task[BatchT]) -> list[Watched]:
    try:
        return watched_modules(task.model, task.trained)
    except ConfigError:
        return []  # the engine of Opacus knows further modules; the losses are compared all the same


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while, or two passes could not be compared."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _message(finding: str) -> str:
    return (
        f"one example's loss depends on the others: {finding}; remove in-batch negatives, batch statistics and means "
        "over the batch from the task"
    )
