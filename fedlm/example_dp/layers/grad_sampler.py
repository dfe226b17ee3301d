"""A gradient sampler takes in what the hook on a module hands it for one parameter; a contribution of the per-example
gradients comes of it.

Legend: B examples, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from fedlm.example_dp.per_example_gradients import Contribution


class GradSampler(ABC):
    """One parameter of one module, fed by the module's calls."""

    needs_input = False
    """The hook must keep the module's input for the backward pass."""

    @abstractmethod
    def receive(self, x: Tensor | None, gradient: Tensor) -> None:
        """Take in one call of the module, in the backward pass; neither tensor may be written into.

        Arguments:
            x: The input (B, ..., in), or None if `needs_input` is false of all the module's gradient samplers.
            gradient: Of the output, (B, ..., out).
        """


class VectorGradSampler(GradSampler):
    """A bias or a gain, whose gradient is small: it is added to the pass's `VectorGradients`.

    Arguments:
        slot: (B, size of the parameter), zero at first.
    """

    def __init__(self, slot: Tensor) -> None:
        self._slot = slot

    def _add(self, gradients: Tensor) -> None:
        """Add the gradient of one call at each token (B, ..., out), summed over the tokens."""
        B, size = self._slot.shape
        self._slot += gradients.reshape(B, -1, size).sum(1)  # (B, T, out) summed over T


class LargeGradSampler(GradSampler, Contribution):
    """A matrix or a table of rows, which keeps what its gradients need in its own way: a contribution by itself.

    Arguments:
        name: Of the parameter, in `task.trained`.
        parameter: Only its shape, type and device are read.
        num_examples: B.
    """

    def __init__(self, name: str, parameter: nn.Parameter, num_examples: int) -> None:
        self.name, self.parameter, self.num_examples = name, parameter, num_examples

    def zero_norms(self) -> Tensor:
        """Return the squared norms (B,) of a module that was not called."""
        return self.parameter.new_zeros(self.num_examples)
