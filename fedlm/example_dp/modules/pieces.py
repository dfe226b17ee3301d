"""A piece is one parameter of one module: what the tap on the module hands it, and what comes of it.

Legend: B examples, T tokens.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from fedlm.example_dp.tape import Contribution


class Piece(Contribution):
    """The contribution of one parameter, fed by the calls of its module.

    Arguments:
        name: Of the parameter, in `task.trained`.
        parameter: Only its shape, type and device are read.
        num_examples: B.
    """

    needs_input = False
    """The tap must keep the module's input for the backward pass."""

    def __init__(self, name: str, parameter: nn.Parameter, num_examples: int) -> None:
        self.name, self.parameter, self.num_examples = name, parameter, num_examples

    @abstractmethod
    def receive(self, x: Tensor | None, gradient: Tensor) -> None:
        """Take in one call of the module, in the backward pass; neither tensor may be written into.

        Arguments:
            x: The input (B, ..., in), or None if `needs_input` is false of all the module's pieces.
            gradient: Of the output, (B, ..., out).
        """

    def zero_norms(self) -> Tensor:
        """Return the squared norms (B,) of a module that was not called."""
        return self.parameter.new_zeros(self.num_examples)
