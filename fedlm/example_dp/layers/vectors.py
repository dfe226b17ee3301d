"""Per-example gradients of all biases and gains of one pass, side by side in one matrix.

A model has dozens of them and each is small: one product over the matrix costs less than a call for each of them.

Legend: B examples, P numbers in all the vectors together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fedlm.example_dp.clip_rule import accepted
from fedlm.example_dp.per_example_gradients import Contribution, PerExampleGradients


class VectorGradients(Contribution):
    """The gradients of some vectors of one type on one device; zero until somebody adds to their slots.

    Arguments:
        parameters: By the name in `task.trained`; a norm's of several dimensions count as vectors.
        num_examples: B.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], num_examples: int) -> None:
        sizes = [parameter.numel() for parameter in parameters.values()]
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._matrix = next(iter(parameters.values())).new_zeros(num_examples, sum(sizes))  # (B, P)
        self.slots = dict(zip(parameters, torch.split(self._matrix, sizes, dim=1), strict=True))
        """Where each vector's gradients go, (B, its size): views of the matrix."""

    def squared_norms(self) -> Tensor:
        """Return (B,)."""
        return self._matrix.square().sum(1)

    def weighted_sums(self, factors: Tensor) -> Mapping[str, Tensor]:
        """Return the weighted sums, in the parameters' shapes."""
        factors, matrix = accepted(factors, self._matrix)
        total = torch.mv(matrix.T, factors)  # (P,)
        parts = torch.split(total, [shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}


def vector_slots(parameters: Iterable[tuple[str, nn.Parameter]], per_example: PerExampleGradients) -> dict[str, Tensor]:
    """Put vectors on the per-example gradients, those of one type and device together; returns the slot of each by
    name."""
    groups: dict[tuple[torch.dtype, torch.device], dict[str, nn.Parameter]] = {}
    for name, parameter in parameters:
        groups.setdefault((parameter.dtype, parameter.device), {})[name] = parameter
    slots: dict[str, Tensor] = {}
    for group in groups.values():
        gradients = VectorGradients(group, per_example.num_examples)
        per_example.add(gradients)
        slots |= gradients.slots
    return slots
