"""Opacus' hooks (Yousefpour et al. 2021, arXiv 2109.12298) behind the same door: the reference to compare with.

Exact where Opacus is; it holds the gradient of every example for every parameter at once, B times the trained model. It
knows modules that `layers/hooks.py` refuses. What it does not know: tensors that are no parameters, so the tables of a
`LanguageTask` are refused by name.

Legend: B examples of a physical batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Generic

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedlm.errors import ConfigError
from fedlm.example_dp.clip_rule import ClipRule, accepted
from fedlm.example_dp.engine import ClippedGradients, checked_losses
from fedlm.example_dp.per_example_gradients import PerExampleGradients
from fedlm.example_dp.refusals import batch_norms, refuse_batch_statistics
from fedlm.example_dp.task import BatchT, Task


class OpacusEngine(Generic[BatchT]):
    """Computes clipped gradients with `opacus.GradSampleModule`; guarantee and edge cases of `PerExampleEngine`.

    Arguments:
        task: All that trains must be parameters of its model.

    Raises:
        ConfigError: A trained tensor that is no parameter or is a batch norm's, or batch statistics.
    """

    def __init__(self, task: Task[BatchT]) -> None:
        parameters = {id(parameter): parameter for parameter in task.model.parameters()}
        if tables := [name for name, tensor in task.trained.items() if id(tensor) not in parameters]:
            raise ConfigError(
                f"Opacus cannot train '{tables[0]}', which is no parameter of the model; use engine = \"fedlm\", or do "
                "not train embedding tables"
            )
        self._task = task
        self._trained: dict[str, nn.Parameter] = {name: parameters[id(tensor)] for name, tensor in task.trained.items()}
        self._batch_norms = batch_norms(task.model)
        refuse_batch_statistics(self._batch_norms)
        _refuse_batch_norms(task.model, self._trained)

    def clipped(self, batch: BatchT, rule: ClipRule) -> ClippedGradients:
        """Return the clipped sums of one physical batch.

        Raises:
            ConfigError: Losses of another shape than (B,), or a parameter for which Opacus finds another number of
                gradients than examples (position ids of shape (1, T)); it names the parameter.
        """
        refuse_batch_statistics(self._batch_norms)
        B = self._task.num_examples(batch)
        with torch.enable_grad(), _hooked(self._task.model, self._trained):
            losses = checked_losses(self._task.losses(batch, PerExampleGradients(B)), B)
            if losses.requires_grad:
                losses.sum().backward()  # type: ignore[no-untyped-call]
            gradients = {name: _per_example(name, parameter, B) for name, parameter in self._trained.items()}
        return _clip(gradients, losses.detach(), rule)


def _refuse_batch_norms(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
    chosen = {id(parameter): name for name, parameter in trained.items()}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, _BatchNorm) and id(parameter) in chosen:
                raise ConfigError(
                    f"trained parameter '{chosen[id(parameter)]}' is in the batch norm '{path}'; freeze it"
                )


def _per_example(name: str, parameter: nn.Parameter, B: int) -> Tensor:
    """Return the gradients that the hooks left, (B, *shape)."""
    found = getattr(parameter, "grad_sample", None)
    if found is None:
        return parameter.detach().new_zeros(B, *parameter.shape)
    if not isinstance(found, Tensor) or len(found) != B:
        raise ConfigError(
            f"Opacus finds no gradient for each of the {B} examples of '{name}'; use engine = \"fedlm\", or freeze it"
        )
    return found.detach()


@torch.no_grad()
def _clip(gradients: Mapping[str, Tensor], losses: Tensor, rule: ClipRule) -> ClippedGradients:
    squares = torch.zeros(len(losses), dtype=torch.float64, device=losses.device)  # (B,)
    for gradient in gradients.values():
        # In float32 a norm of millions of numbers alike is off by more than the clip rule's slack.
        squares += torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64).square()
    norms = squares.sqrt().cpu()
    factors = rule.factors(norms).to(losses)
    sums = {}
    for name, gradient in gradients.items():
        weights, chosen = accepted(factors, gradient)
        sums[name] = torch.tensordot(weights, chosen, dims=1)
    return ClippedGradients.of(sums, norms, losses, rule)


@contextmanager
def _hooked(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put Opacus' hooks on a model for one pass, with nothing but `trained` to differentiate."""
    from opacus.grad_sample import GradSampleModule

    chosen = {id(parameter) for parameter in trained.values()}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    owners = [m for m in model.modules() if chosen & {id(parameter) for parameter in m.parameters(recurse=False)}]
    modes = [(module, module.training) for module in owners]
    for module in owners:  # Opacus looks at no module in evaluation mode; to those that own weights it makes no odds
        module.training = True
    for parameter, _, _ in before:
        parameter.requires_grad_(id(parameter) in chosen)
        parameter.grad = None
    hooks = GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=False)
    try:
        with warnings.catch_warnings():  # inputs of the lowest module need no gradient, and that is all it says
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            yield
    finally:
        hooks.to_standard_module()
        for module, mode in modes:
            module.training = mode
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
