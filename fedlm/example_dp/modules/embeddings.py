"""Per-example gradients of an embedding module: sums over the distinct (example, id) pairs, never a (B, V, D) tensor.

    |g_i|^2 = sum_r | sum_(t: id_(i,t) = r) dL_i/dy_(i,t) |^2

Exact. Tables of a language model are not modules and belong to `tables/phantom.py`.

Legend: B examples, T tokens, V rows of the table, D width, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlm.example_dp.clip_rule import accepted
from fedlm.example_dp.modules.pieces import Piece


class RowsPiece(Piece):
    """The weight of an `nn.Embedding` or of our `Positions`.

    Arguments:
        name: Of the parameter.
        parameter: (V, D).
        padding: The row that never gets a gradient (`padding_idx`), or None.
    """

    needs_input = True

    def __init__(self, name: str, parameter: nn.Parameter, num_examples: int, *, padding: int | None = None) -> None:
        super().__init__(name, parameter, num_examples)
        self._padding = padding
        self._calls: list[tuple[Tensor, Tensor]] = []  # pair keys (N,), gradients (N, D)
        self._keys: Tensor | None = None  # (P,) example * V + id, increasing
        self._rows: Tensor | None = None  # (P, D)

    def receive(self, x: Tensor | None, gradient: Tensor) -> None:
        """Take in the ids (B, ...) of a call and the gradient of its output (B, ..., D)."""
        assert x is not None
        ids = x.reshape(self.num_examples, -1).long()  # (B, T)
        examples = torch.arange(self.num_examples, device=ids.device)[:, None]
        keys = (examples * len(self.parameter) + ids).flatten()  # (B T,)
        gradients = gradient.reshape(-1, gradient.shape[-1])  # (B T, D)
        if self._padding is not None:
            counts = (ids != self._padding).flatten()
            keys, gradients = keys[counts], gradients[counts]
        self._calls.append((keys, gradients))

    def squared_norms(self) -> Tensor:
        """Return (B,)."""
        norms = self.zero_norms()
        if not self._calls:
            return norms
        keys, gradients = (torch.cat(part) for part in zip(*self._calls, strict=True))
        self._calls.clear()
        self._keys, place = torch.unique(keys, return_inverse=True)  # (P,), (N,)
        self._rows = gradients.new_zeros(len(self._keys), gradients.shape[1]).index_add_(0, place, gradients)
        return norms.index_add_(0, self._keys // len(self.parameter), self._rows.square().sum(1))

    def weighted_sums(self, factors: Tensor) -> Mapping[str, Tensor]:
        """Return the weighted sum (V, D)."""
        if self._rows is None or self._keys is None:
            return {}
        V = len(self.parameter)
        weights, keys, rows = accepted(factors[self._keys // V], self._keys, self._rows)  # (P',), (P',), (P', D)
        self._keys = self._rows = None
        return {self.name: torch.zeros_like(self.parameter).index_add_(0, keys % V, rows * weights[:, None])}
