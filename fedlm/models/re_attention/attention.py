"""Re-Attention: attention corrected for the DP noise of the weights (Ding et al. 2024, arXiv 2405.18194).

DP noise makes a key a random variable. With variance s_j^2 of each coordinate of key j,

    E exp(<q, K_j> / sqrt(W)) = exp(<q, k_j> / sqrt(W) + |q|^2 s_j^2 / (2 W)),

so noisier keys get more attention than their means deserve ("attention distraction"). Attention becomes

    softmax_j(<q, k_j> / sqrt(W) - |q|^2 s_j^2 / (2 W)),

a bias of rank one in query norm and key variance (`fedlm.models.attention` applies it, fused or not). The variances
come from `NoiseLevels` and are propagated beside the means, layer by layer, in the same forward pass:

    linear      sum_i v_i W_ji^2 + vW sum_i (m_i^2 + v_i) + vb     frozen weights have vW = vb = 0
    LoRA        the same through W + s B A for the input's noise, and through B and A for theirs
    LayerNorm   min(v / std^2, 1) gamma^2 + v_gamma (z^2 + v / std^2) + v_beta,  z the normalised input
    GELU        v gelu'(m)^2                                      delta method
    attention   sum_j S_j^2 v_j                                   S the corrected weights
    residual    sum

**Exact** for Gaussian noise of known variance: the expectation of one exponential. **Approximate**: a ratio of
expectations stands for the expectation of the softmax; coordinates, tokens and branches count as independent (a word
that occurs twice has the same error twice); queries count as exact; the released weights stand for their means; W^2 of
linear modules is that of the noised weights; dropout masks are left out of the variances. The cap in LayerNorm is ours:
its output has unit mean square, of which noise cannot be more than all, and it keeps the relative variances of
`per_frequency` levels in range.

**Gradient**: exact for the loss with all variances held constant: |q|^2 in the correction is differentiated, s_j^2 is
not (it is a statistic, computed without a graph). **Privacy**: an example's loss still depends on that example alone
and on public numbers, so nothing is paid. **Bytes a device sends**: none.

Legend: B batch, T tokens, D model width, H heads, W = D / H.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlm.models.attention import attention_variance, causal_attention

_MOST_RELATIVE_VARIANCE = 1.0


class Noised(NamedTuple):
    """An activation and the variance of its noise, both (B, T, ...); the variance has no graph."""

    mean: Tensor
    variance: Tensor


class NoiseFlow:
    """The rules that carry variances through the modules of one forward pass.

    Each method calls the module on the mean as a forward pass without Re-Attention would, so hooks see what they always
    see.

    Arguments:
        weights: Variance of the coordinates of each trained parameter, by `id`; absent: exact.
    """

    def __init__(self, weights: Mapping[int, float]) -> None:
        self._weights = weights

    def of(self, parameter: Tensor | None) -> float:
        """Return the variance of a parameter's coordinates."""
        return 0.0 if parameter is None else self._weights.get(id(parameter), 0.0)

    def linear(self, module: nn.Module, x: Noised) -> Noised:
        """Apply a linear module, or one that peft wrapped: (B, T, in) to (B, T, out)."""
        mean: Tensor = module(x.mean)  # (B, T, out)
        with torch.no_grad():
            base = getattr(module, "base_layer", module)
            assert isinstance(base, nn.Linear)
            weight: Tensor = base.weight  # (out, in)
            from_weights = self._weight_noise(weight, base.bias, x)  # (B, T, 1)
            for name in getattr(module, "active_adapters", ()):
                wrapped: Any = module  # of peft, which is not loaded for a model without adapters
                a, b, scale = wrapped.lora_A[name].weight, wrapped.lora_B[name].weight, wrapped.scaling[name]
                weight = weight + scale * (b @ a)  # (out, in)
                from_weights = from_weights + scale**2 * self._factor_noise(a, b, x)  # (B, T, out)
            return Noised(mean, F.linear(x.variance, weight.square()).add_(from_weights))

    def _weight_noise(self, weight: Tensor, bias: Tensor | None, x: Noised) -> Tensor:
        """Return the variance that noise of a dense matrix and its bias adds to each output, (B, T, 1)."""
        second_moment = (x.mean.square() + x.variance).sum(-1, keepdim=True)  # (B, T, 1)
        return self.of(weight) * second_moment + self.of(bias)

    def _factor_noise(self, a: Tensor, b: Tensor, x: Noised) -> Tensor:
        """Return the variance that noise of A (R, in) and B (out, R) adds to B A x, (B, T, out)."""
        from_a = self._weight_noise(a, None, x)  # (B, T, 1), the same on all R coordinates of A x
        from_x = F.linear(x.variance, a.square())  # (B, T, R)
        inner = Noised(F.linear(x.mean, a), from_x + from_a)  # (B, T, R)
        return from_a * b.square().sum(-1) + self._weight_noise(b, None, inner)

    def layer_norm(self, module: nn.LayerNorm, x: Noised) -> Noised:
        """Apply a LayerNorm: (B, T, D) to (B, T, D)."""
        mean = module(x.mean)  # (B, T, D)
        with torch.no_grad():
            spread, centre = torch.var_mean(x.mean, -1, keepdim=True, correction=0)  # (B, T, 1) each
            spread = spread + module.eps
            relative = (x.variance / spread).clamp_(max=_MOST_RELATIVE_VARIANCE)  # (B, T, D)
            gain = self.of(module.weight)
            variance = (relative * (module.weight.square() + gain)).add_(self.of(module.bias))
            if gain:
                variance.addcdiv_((x.mean - centre).square_(), spread, value=gain)
        return Noised(mean, variance)

    def gelu(self, x: Noised) -> Noised:
        """Apply GELU, elementwise."""
        mean = F.gelu(x.mean)
        with torch.no_grad():
            density = x.mean.square().mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
            slope = (x.mean * math.sqrt(0.5)).erf_().add_(1).mul_(0.5).addcmul_(x.mean, density)
            return Noised(mean, slope.square_().mul_(x.variance))

    def attention(self, qkv: Noised, num_heads: int) -> Noised:
        """Apply corrected causal attention: (B, T, 3D) to (B, T, D)."""
        B, T, _ = qkv.mean.shape
        _, k, v = qkv.variance.chunk(3, -1)  # (B, T, D) each
        key_noise = k.reshape(B, T, num_heads, -1).mean(-1)  # (B, T, H)
        mixed = causal_attention(qkv.mean, num_heads, key_noise)  # (B, T, D)
        return Noised(mixed, attention_variance(qkv.mean, v, num_heads, key_noise))
