"""What one forward and backward pass leaves behind for the gradients of single examples.

Every trainable piece of a model (a linear module, a LayerNorm, the embedding tables) adds one `Contribution` to the
pass's `PerExampleGradients`. Once the backward pass is done each of them knows the squared norm of its gradient for
each example, and, given each example's clip factor, their weighted sum. No piece ever needs a second backward pass.

Legend: B examples of a physical batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor


class Contribution(ABC):
    """The part of some parameters in the per-example gradients of one batch; complete after the backward pass."""

    @abstractmethod
    def squared_norms(self) -> Tensor:
        """Return the squared L2 norm of each example's gradient of these parameters together, (B,)."""

    @abstractmethod
    def weighted_sums(self, factors: Tensor) -> Mapping[str, Tensor]:
        """Return `sum_i factors_i g_i` of each parameter by name, in the parameter's shape; asked for once, last.

        Arguments:
            factors: (B,), non-negative.
        """


class PerExampleGradients:
    """Collects the contributions of one pass.

    Arguments:
        num_examples: B.
    """

    def __init__(self, num_examples: int) -> None:
        self.num_examples = num_examples
        self.contributions: list[Contribution] = []
        self.trigger = torch.zeros((), requires_grad=True)
        """An input for autograd functions that must run backward although none of their tensors has a gradient."""

    def add(self, contribution: Contribution) -> None:
        """Note a piece; its parameters are those of no other contribution of these per-example gradients."""
        self.contributions.append(contribution)
