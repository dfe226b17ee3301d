"""What is trained with example-level DP: a model, what trains in it, and a loss for each example.

Legend: B examples of a physical batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from fedlm.example_dp.per_example_gradients import PerExampleGradients

BatchT = TypeVar("BatchT")
CovariantBatch = TypeVar("CovariantBatch", covariant=True)


class Examples(Protocol[CovariantBatch]):
    """The private data: what one example is, is the unit of privacy."""

    def __len__(self) -> int:
        """Return the number of examples, n."""

    def lengths(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how long some examples are (B,), in tokens: alike ones go into one physical batch."""

    def batch(self, indices: npt.NDArray[np.int64]) -> CovariantBatch:
        """Return these examples (B,) as one physical batch; B may be 1, never 0."""


class Task(ABC, Generic[BatchT]):
    """A model with a loss for each example.

    Attributes:
        model: Its modules are watched where they hold trained parameters.
        trained: What trains, by name: parameters of `model` under their `named_parameters` name, and whatever tensors
            the task takes care of itself (embedding tables). A step writes into these tensors in place.
    """

    model: nn.Module
    trained: Mapping[str, Tensor]

    @abstractmethod
    def num_examples(self, batch: BatchT) -> int:
        """Return B."""

    def begin_step(self, step: int, secret: bytes) -> None:
        """Be told before a logical step's first physical batch which step it is; a task that draws, draws from this.

        How examples fall into physical batches depends on who was sampled. What is drawn must not: one negative set
        for each *step*, shared by its physical batches; dropout masks independent of each other, from `secret` alone.
        Otherwise one example more would change the gradients of the others.

        Arguments:
            step: Counted from 0 over all phases; numbers draws that are public, such as negatives.
            secret: 32 bytes, new for each step, for draws that each example has to itself, such as dropout.
        """

    @abstractmethod
    def losses(self, batch: BatchT, per_example: PerExampleGradients) -> Tensor:
        """Return the loss of each example, (B,), with a graph.

        Each one must depend on its own example alone: sums or means over an example's own tokens, no statistics of the
        batch, no negatives out of the batch. Trained tensors that are no parameters of `model` add their contribution
        to the per-example gradients here.
        """
