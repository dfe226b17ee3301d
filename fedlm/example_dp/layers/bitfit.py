"""DP-BiTFiT: differentially private training of bias terms alone (Bu, Wang, Zha, Karypis 2022, arXiv 2210.00036).

    g_i = sum_t dL_i / ds_(i,t)        s = W a + b, the output of the module; the same for LayerNorm's bias

Exact. No activation enters, so none is stored: the module itself runs with all its parameters frozen, and the gradient
of its output, which goes back through the network in any case, is summed over the tokens on its way and freed as ever.
Per module there are B x out numbers, whatever T is. Non-private training of the biases makes the same sum, over the
batch as well.

Legend: B examples, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from fedlm.example_dp.layers.grad_sampler import VectorGradSampler


class BiasGradSampler(VectorGradSampler):
    """A parameter that is added to every token's output: the bias of a linear module or of a norm."""

    def receive(self, x: Tensor | None, gradient: Tensor) -> None:
        """Add the gradient of one call's output (B, ..., out), summed over its tokens."""
        self._add(gradient)
