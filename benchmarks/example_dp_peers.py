"""The other sides of the example-level DP comparison: plain PyTorch, Opacus, fastDP; runs without fedlm.

A side's step is forward, backward and clipping of one physical batch: no noise, no optimiser.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.example_dp_models import CLIP_NORM, Inputs, choose, losses, one_at_a_time


class Side(Protocol):
    """One way to train a model."""

    def step(self, inputs: Inputs) -> Mapping[str, Tensor]:
        """Return the clipped sum of the examples' gradients by name; plain PyTorch returns the sum, not clipped."""

    def stock_names(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return them under the stock model's names and in its shapes."""


class _StockSide:
    """A side that trains the stock model itself.

    Arguments:
        model: The stock model.
        kind: Its kind.
        scope: What trains.
    """

    def __init__(self, model: nn.Module, kind: str, scope: str) -> None:
        self.model, self.parameters = model, choose(model, kind, scope)

    def stock_names(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the sums as they are."""
        return sums


class Plain(_StockSide):
    """Non-private training."""

    def step(self, inputs: Inputs) -> Mapping[str, Tensor]:
        """Return the sum of gradients."""
        self.model.zero_grad(set_to_none=True)
        losses(self.model, inputs).sum().backward()  # type: ignore[no-untyped-call]
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}


class OneAtATime(_StockSide):
    """The definition: what every private side must compute."""

    def step(self, inputs: Inputs) -> Mapping[str, Tensor]:
        """Return the clipped sum."""
        return one_at_a_time(self.model, self.parameters, inputs)


class OpacusHooks(_StockSide):
    """Opacus with per-sample gradients by hooks; its own optimiser clips."""

    def __init__(self, model: nn.Module, kind: str, scope: str) -> None:
        super().__init__(model, kind, scope)
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        self._module = GradSampleModule(model, loss_reduction="sum", strict=False)
        self._optimizer = DPOptimizer(_no_op(self.parameters), **_OPACUS)

    def step(self, inputs: Inputs) -> Mapping[str, Tensor]:
        """Return the clipped sum."""
        self._optimizer.zero_grad(set_to_none=True)
        losses(self._module, inputs).sum().backward()  # type: ignore[no-untyped-call]
        self._optimizer.clip_and_accumulate()
        return {name: p.summed_grad for name, p in self.parameters.items()}  # type: ignore[attr-defined]


class OpacusGhost(_StockSide):
    """Opacus with ghost norms and a second backward pass."""

    def __init__(self, model: nn.Module, kind: str, scope: str) -> None:
        super().__init__(model, kind, scope)
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping

        self._module = GradSampleModuleFastGradientClipping(
            model, loss_reduction="sum", strict=False, max_grad_norm=CLIP_NORM
        )
        self._optimizer = DPOptimizerFastGradientClipping(_no_op(self.parameters), **_OPACUS)

    def step(self, inputs: Inputs) -> Mapping[str, Tensor]:
        """Return the clipped sum."""
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        self._optimizer.zero_grad(set_to_none=True)
        each = losses(self._module, inputs)  # (B,)
        DPTensorFastGradientClipping(self._module, self._optimizer, each, loss_reduction="sum").backward()
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}


class FastDp(_StockSide):
    """fastDP's book-keeping in its mixed form (MixOpt) with its origin-parameter trick, as its documentation advises.

    Its swapped forward methods are of transformers 4 and do not run with version 5; they only repeat position ids for
    each example, which our batch does, so they are left out. Clipped sums are added to zeros that stand ready, as it
    does from the second physical batch on: the first would be given noise.
    """

    def __init__(self, model: nn.Module, kind: str, scope: str) -> None:
        super().__init__(model, kind, scope)
        import fastDP.privacy_engine as engine  # type: ignore[import-not-found]

        engine.transformers_support.forward_swapper = lambda module: None
        with contextlib.redirect_stdout(io.StringIO()):
            engine.PrivacyEngine(
                model, batch_size=1, sample_size=1000, epochs=1, noise_multiplier=0.0, max_grad_norm=CLIP_NORM,
                clipping_fn="Abadi", clipping_mode="MixOpt", clipping_style="all-layer", loss_reduction="sum",
                origin_params=None if scope == "bias" else ["_embeddings", "wte", "wpe"],
            )  # fmt: skip

    def step(self, inputs: Inputs) -> Mapping[str, Tensor]:
        """Return the clipped sum."""
        self.model.zero_grad(set_to_none=True)
        trained: Mapping[str, Any] = self.parameters
        for parameter in trained.values():
            parameter.private_grad = torch.zeros_like(parameter)
        losses(self.model, inputs).sum().backward()  # type: ignore[no-untyped-call]
        return {name: parameter.private_grad for name, parameter in trained.items()}


_OPACUS: Any = {
    "noise_multiplier": 0.0,
    "max_grad_norm": CLIP_NORM,
    "expected_batch_size": None,
    "loss_reduction": "sum",
}
SIDES: Mapping[str, type[Plain] | type[OneAtATime] | type[OpacusHooks] | type[OpacusGhost] | type[FastDp]] = {
    "plain": Plain,
    "one at a time": OneAtATime,
    "opacus hooks": OpacusHooks,
    "opacus ghost": OpacusGhost,
    "fastdp": FastDp,
}


def _no_op(parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters.values(), lr=0.0)
