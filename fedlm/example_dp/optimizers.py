"""Optimizers of noised gradients. What they do with a release is post-processing and costs no privacy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlm.errors import ConfigError
from fedlm.ranges import require_number

KINDS = ("adam", "sgd")


class ReleaseOptimizer:
    """Steps trained tensors along releases; plain tensors too, for it never needs their own gradients.

    Arguments:
        kind: "adam" or "sgd", torch's with their defaults (no momentum, no weight decay).
        trained: By name; written in place, their memory must stay where it is.
        learning_rate: Above 0.

    Raises:
        ConfigError: Another kind, or a learning rate out of range.
    """

    def __init__(self, kind: str, trained: Mapping[str, Tensor], learning_rate: float) -> None:
        require_number("learning_rate", learning_rate, above=0)
        self._leaves = {name: tensor.detach() for name, tensor in trained.items()}  # the same memory, no graph
        leaves = list(self._leaves.values())
        self._optimizer: torch.optim.Optimizer
        if kind == "adam":
            self._optimizer = torch.optim.Adam(leaves, lr=learning_rate)
        elif kind == "sgd":
            self._optimizer = torch.optim.SGD(leaves, lr=learning_rate)
        else:
            raise ConfigError(f"optimizer = {kind!r} is unknown; choose from {', '.join(KINDS)}")

    def step(self, release: Mapping[str, Tensor]) -> None:
        """Move every trained tensor; `release` has a gradient for each of them."""
        for name, leaf in self._leaves.items():
            leaf.grad = release[name].to(leaf.dtype)
        self._optimizer.step()
        for leaf in self._leaves.values():
            leaf.grad = None
