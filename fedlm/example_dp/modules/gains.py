"""Per-example gradients of the gain of a norm: `g_i = sum_t dL_i/dy_(i,t) * normed_(i,t)` for LayerNorm and RMSNorm.

The normed input is computed again from the input, which the norm's own backward pass holds anyway.

Legend: B examples, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlm.example_dp.clip_rule import accepted
from fedlm.example_dp.modules.pieces import Piece

_PROBE_TOLERANCE = 1e-4  # relative; float32 rounding is a hundred times smaller


class GainPiece(Piece):
    """The weight of a `LayerNorm` or of an RMSNorm that `is_plain_rms_norm`.

    Arguments:
        name: Of the parameter.
        parameter: (D,), or a norm's shape of several dimensions.
        module: The norm.
    """

    needs_input = True

    def __init__(self, name: str, parameter: nn.Parameter, num_examples: int, module: nn.Module) -> None:
        super().__init__(name, parameter, num_examples)
        self._module = module
        self._gradient: Tensor | None = None  # (B, D)

    def receive(self, x: Tensor | None, gradient: Tensor) -> None:
        """Add the gradient of one call, summed over its tokens."""
        assert x is not None
        product = (gradient * _normed(self._module, x)).view(self.num_examples, -1, self.parameter.numel())  # (B, T, D)
        summed = product.sum(1)  # (B, D)
        self._gradient = summed if self._gradient is None else self._gradient.add_(summed)

    def squared_norms(self) -> Tensor:
        """Return (B,)."""
        return self.zero_norms() if self._gradient is None else self._gradient.square().sum(1)

    def weighted_sums(self, factors: Tensor) -> Mapping[str, Tensor]:
        """Return the weighted sum, in the parameter's shape."""
        if self._gradient is None:
            return {}
        factors, gradient = accepted(factors, self._gradient)
        self._gradient = None
        return {self.name: torch.mv(gradient.T, factors).view(self.parameter.shape)}


@torch.no_grad()
def is_plain_rms_norm(module: nn.Module) -> bool:
    """Say whether a module computes `x / sqrt(mean x^2 + eps) * weight`; Gemma's, for one, has `1 + weight`."""
    weight = module._parameters.get("weight")
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.ndim != 1 or not type(module).__name__.endswith("RMSNorm"):
        return False
    probe = (
        torch.arange(1, 2 * len(weight) + 1, device=weight.device).to(weight.dtype).sin().view(1, 2, -1)
    )  # (1, 2, D)
    gain = 1.5 + probe[0, 0]  # (D,)
    epsilon = torch.finfo(weight.dtype).eps if epsilon is None else epsilon
    wanted = probe * (probe.square().mean(-1, keepdim=True) + epsilon).rsqrt() * gain  # (1, 2, D)
    found = _with_gain(module, gain, probe)
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=_PROBE_TOLERANCE, atol=_PROBE_TOLERANCE)


def _normed(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    return _with_gain(module, x.new_ones(x.shape[-1]), x)


@torch.no_grad()
def _with_gain(module: nn.Module, gain: Tensor, x: Tensor) -> Tensor:
    """Run a norm with another gain, in whatever precision it computes by itself."""
    weight = module._parameters["weight"]
    module._parameters["weight"] = nn.Parameter(gain, requires_grad=False)
    try:
        normed: Tensor = type(module).forward(module, x)
        return normed
    finally:
        module._parameters["weight"] = weight
