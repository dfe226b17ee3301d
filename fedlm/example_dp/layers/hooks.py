"""Hooks: in a pass every module that owns a trained parameter hands its input and its output's gradient to its gradient
samplers.

The module's own forward runs unchanged, with all parameters frozen, so autograd computes no gradient of a parameter and
stores no input for one. The hook is the identity on the output; its backward pass is where the gradient samplers are
fed. (A tensor hook on the output would cost less, but is lost when an activation changes the output of a linear module
in place, because that output is a view.)

What is exact for which module: linear modules (`nn.Linear`, GPT-2's `Conv1D`), also called several times a pass, LoRA's
factors among them; `nn.LayerNorm`; RMSNorms that only scale by their weight; `nn.Embedding`; our `Positions`.

Legend: B examples, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedlm.errors import ConfigError
from fedlm.example_dp.layers.bitfit import BiasGradSampler
from fedlm.example_dp.layers.embeddings import RowsGradSampler
from fedlm.example_dp.layers.gains import GainGradSampler, is_plain_rms_norm
from fedlm.example_dp.layers.grad_sampler import GradSampler
from fedlm.example_dp.layers.matrix import MatrixGradSampler
from fedlm.example_dp.layers.vectors import vector_slots
from fedlm.example_dp.per_example_gradients import Contribution, PerExampleGradients
from fedlm.models.layers import Positions


@dataclass(frozen=True)
class Watched:
    """A module and what trains in it.

    Arguments:
        path: Of the module in the model.
        module: Of a kind that `module_kind` knows.
        parameters: What trains, by the name inside the module ("weight", "bias").
        names: The same parameters' names in `task.trained`.
    """

    path: str
    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    names: Mapping[str, str]

    @cached_property
    def kind(self) -> str | None:
        """Return what `module_kind` says."""
        return module_kind(self.module)

    def vectors(self) -> dict[str, nn.Parameter]:
        """Return its biases and gains, by their names in `task.trained`."""
        chosen = self.parameters if self.kind == "norm" else self.parameters.keys() & {"bias"}
        return {self.names[local]: self.parameters[local] for local in chosen}

    def samplers(self, num_examples: int, slots: Mapping[str, Tensor]) -> list[GradSampler]:
        """Return a new gradient sampler for each trained parameter; `slots` are the vectors', by name."""
        return [self._sampler(local, parameter, num_examples, slots) for local, parameter in self.parameters.items()]

    def _sampler(self, local: str, parameter: nn.Parameter, B: int, slots: Mapping[str, Tensor]) -> GradSampler:
        name = self.names[local]
        if local == "bias":
            return BiasGradSampler(slots[name])
        if self.kind == "norm":
            return GainGradSampler(slots[name], self.module)
        if self.kind == "embedding":
            padding = self.module.padding_idx if isinstance(self.module, nn.Embedding) else None
            return RowsGradSampler(name, parameter, B, padding=padding)
        if self.kind == "positions":
            return RowsGradSampler(name, parameter, B)
        return MatrixGradSampler(name, parameter, B, is_transposed=self.kind == "conv1d")


def module_kind(module: nn.Module) -> str | None:
    """Return what kind of module it is to a hook: "linear", "conv1d", "norm", "embedding", "positions"; None: unknown.

    The exact types alone: a subclass may use its parameters in another way.
    """
    kinds: dict[type[nn.Module], str] = {
        nn.Linear: "linear", nn.LayerNorm: "norm", nn.Embedding: "embedding", Positions: "positions",
    }  # fmt: skip
    if kind := kinds.get(type(module)):
        return kind
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return "conv1d"
    return "norm" if is_plain_rms_norm(module) else None


class LayerHooks:
    """What to hook of a model in each pass; the model keeps its modules and parameters from here on.

    Arguments:
        model: All its parameters are frozen during a pass: autograd would keep the inputs of a linear module whose
            weight it believes to train.
        watched: The modules to hook; none is allowed.
    """

    def __init__(self, model: nn.Module, watched: Sequence[Watched]) -> None:
        self._parameters, self._watched = list(model.parameters()), watched

    @contextmanager
    def on(self, per_example: PerExampleGradients) -> Iterator[None]:
        """Tap and freeze for one pass; both are undone at the end, after an error too."""
        slots = vector_slots([item for one in self._watched for item in one.vectors().items()], per_example)
        with ExitStack() as undo:
            for parameter in self._parameters:
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    undo.callback(parameter.requires_grad_)
            for one in self._watched:
                samplers = one.samplers(per_example.num_examples, slots)
                for sampler in samplers:
                    if isinstance(sampler, Contribution):
                        per_example.add(sampler)
                handle = one.module.register_forward_hook(_Hook(one, samplers, per_example), with_kwargs=True)
                undo.callback(handle.remove)
            yield


class _Hook:
    """Puts the hook behind each call of one module."""

    def __init__(self, watched: Watched, samplers: list[GradSampler], per_example: PerExampleGradients) -> None:
        self._watched, self._samplers, self._per_example_gradients = watched, samplers, per_example
        self._needs_input = any(sampler.needs_input for sampler in samplers)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        B, kind = self._per_example_gradients.num_examples, self._watched.kind
        if kind == "embedding":
            x, y = _per_example(x, y, B)
        elif kind == "positions":
            x = torch.arange(y.shape[1], device=y.device).expand(B, -1)  # (B, T)
        if x.ndim < 2 or x.shape[0] != B or y.shape[0] != B:
            raise ConfigError(
                f"module '{self._watched.path}' was called with an input of shape {tuple(x.shape)} in a batch of {B} "
                "examples: the first dimension must be the example; freeze its parameters or reshape in the model"
            )
        kept = x.detach() if self._needs_input else None
        hooked_y: Tensor = _FeedSamplers.apply(y, kept, self._per_example_gradients.trigger, self._samplers)  # type: ignore[no-untyped-call]
        return hooked_y


def _per_example(ids: Tensor, rows: Tensor, B: int) -> tuple[Tensor, Tensor]:
    """Expand position ids (T,) or (1, T), which all examples share, to (B, T), and their rows to (B, T, D).

    Left to broadcasting, the gradient of the rows would already be summed over the batch.
    """
    if ids.ndim == 1:
        ids, rows = ids[None], rows[None]
    if len(ids) == 1 != B:
        return ids.expand(B, *ids.shape[1:]), rows.expand(B, *rows.shape[1:])
    return ids, rows


class _FeedSamplers(torch.autograd.Function):
    """The identity; its backward pass feeds the gradient samplers."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor | None, trigger: Tensor, samplers: list[GradSampler]) -> Tensor:
        ctx.save_for_backward(x)  # autograd notices if somebody writes into it
        ctx.samplers = samplers
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x,) = grad_outputs, ctx.saved_tensors
        for sampler in ctx.samplers:
            sampler.receive(x, gradient)
        return gradient, None, None, None
