"""Per-example gradients of the gain of a norm: `g_i = sum_t dL_i/dy_(i,t) * normed_(i,t)` for LayerNorm and RMSNorm.

The normed input is computed again from the input, which the norm's own backward pass holds anyway.

Legend: B examples, T tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlm.example_dp.layers.grad_sampler import VectorGradSampler

_PROBE_TOLERANCE = 1e-4  # relative; float32 rounding is a hundred times smaller


class GainGradSampler(VectorGradSampler):
    """The weight of a `LayerNorm` or of an RMSNorm that `is_plain_rms_norm`.

    Arguments:
        slot: (B, D).
        module: The norm.
    """

    needs_input = True

    def __init__(self, slot: Tensor, module: nn.Module) -> None:
        super().__init__(slot)
        self._module = module

    def receive(self, x: Tensor | None, gradient: Tensor) -> None:
        """Add the gradient of one call's output (B, ..., D), summed over its tokens."""
        assert x is not None
        self._add(gradient * _normed(self._module, x))


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
