"""What the models of our own share: linear modules without a hidden draw, dropout with its generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init


def empty_linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """Return a linear module with uninitialised weights.

    torch's own constructor draws from the global generator, and fills memory that a worker is about to
    replace by a view of shared memory anyway.
    """
    module = skip_init(nn.Linear, in_features, out_features, bias=bias)  # type: ignore[no-untyped-call]
    assert isinstance(module, nn.Linear)
    return module


class Dropout(nn.Module):
    """Dropout whose masks come from a generator that the model's dropouts share.

    `torch.nn.Dropout` draws from the global generator, which would make a device's update depend on whatever
    ran before it in the same process.

    Arguments:
        rate: Probability that an element becomes zero.
        generator: Seeded by the training loop through `seed_dropout` of the model.
    """

    def __init__(self, rate: float, generator: torch.Generator) -> None:
        super().__init__()
        self.rate = rate
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with elements dropped in training mode, `x` itself otherwise."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.rate, generator=self.generator)
        return x * keep.div_(1 - self.rate)
