"""DP-BiTFiT: differentially private training of bias terms alone (Bu, Wang, Zha, Karypis 2022, arXiv 2210.00036).

    g_i = sum_t dL_i / ds_(i,t)        s = W a + b, the output of the module; the same for LayerNorm's bias

Exact. No activation enters, so none is stored: the module itself runs with all its parameters frozen, and the gradient
of its output, which goes back through the network in any case, is summed over the tokens on its way and freed as ever.
Per module there are B x out numbers, whatever T is. Non-private training of the biases makes the same sum, over the
batch as well.

Legend: B examples, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlm.example_dp.clip_rule import accepted
from fedlm.example_dp.modules.pieces import Piece


class BiasPiece(Piece):
    """A parameter that is added to every token's output: the bias of a linear module or of a norm.

    Arguments:
        name: Of the parameter.
        parameter: The bias, (out,) or the shape of a norm.
    """

    def __init__(self, name: str, parameter: nn.Parameter, num_examples: int) -> None:
        super().__init__(name, parameter, num_examples)
        self._gradient: Tensor | None = None  # (B, out)

    def receive(self, x: Tensor | None, gradient: Tensor) -> None:
        """Add the gradient of one call's output (B, ..., out), summed over its tokens."""
        tokens = gradient.reshape(self.num_examples, -1, self.parameter.numel())  # (B, T, out)
        summed = tokens.sum(1)  # (B, out)
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
