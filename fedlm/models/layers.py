"""What the models of our own share: linear modules without a hidden draw, positions, dropout with its generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from fedlm.errors import DataError


def empty_linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """Return a linear module with uninitialised weights.

    torch's own constructor draws from the global generator, and fills memory that a worker is about to
    replace by a view of shared memory anyway.
    """
    module = skip_init(nn.Linear, in_features, out_features, bias=bias)  # type: ignore[no-untyped-call]
    assert isinstance(module, nn.Linear)
    return module


class Positions(nn.Module):
    """Learned positions, added to the input; uninitialised.

    Arguments:
        max_length: Longest sequence, in tokens.
        d_model: D.
    """

    def __init__(self, max_length: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_length, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` (B, T, D) with the first T positions added.

        Raises:
            DataError: T is longer than `max_length`.
        """
        return x + self.first(x.shape[1])

    def first(self, length: int) -> Tensor:
        """Return the first positions (length, D)."""
        max_length = len(self.weight)
        if length > max_length:
            raise DataError(f"a sequence of {length} tokens; the model has {max_length} positions; cut it")
        return self.weight[:length]


class Dropout(nn.Module):
    """Dropout whose masks come from a generator that the model's dropouts share.

    `torch.nn.Dropout` draws from the global generator, which would make a device's update depend on whatever
    ran before it in the same process.

    Arguments:
        rate: Probability that an element becomes zero, in steps of 2^-16.
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
        return x * keep_mask(x.shape, self.rate, self.generator).to(x.device)


def keep_mask(shape: torch.Size, rate: float, generator: torch.Generator) -> Tensor:
    """Return a dropout mask: 1/(1 - rate) where an element stays, 0 where it is dropped.

    Four elements share one 64-bit draw, which makes masks five times cheaper than `bernoulli_`.
    """
    size = shape.numel()
    bits = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    dropped = round(rate * 2**16)
    keep = bits.view(torch.int16)[:size] >= dropped - 2**15
    return keep.view(shape) * (2**16 / (2**16 - dropped))
