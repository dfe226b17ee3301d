"""Per-example gradients of an embedding module: sums over distinct (example, id) pairs, never a (B, V, D) tensor.

    |g_i|^2 = sum_r | sum_(t: id_(i,t) = r) dL_i/dy_(i,t) |^2

Exact. Tables of a language model are not modules and belong to `tables/phantom.py`.

Legend: B examples, T tokens, V rows of the table, D width, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlm.example_dp.clip_rule import accepted
from fedlm.example_dp.layers.grad_sampler import LargeGradSampler
from fedlm.example_dp.tables.row_pairs import RowPairs


class RowsGradSampler(LargeGradSampler):
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
        self._calls: list[tuple[Tensor, Tensor, Tensor]] = []  # examples (N,), ids (N,), gradients (N, D)
        self._pairs: RowPairs | None = None
        self._rows = parameter.new_zeros(0)  # (P, D) once there are pairs

    def receive(self, x: Tensor | None, gradient: Tensor) -> None:
        """Take in the ids (B, ...) of a call and the gradient of its output (B, ..., D)."""
        assert x is not None
        ids = x.reshape(self.num_examples, -1).long()  # (B, T)
        examples = torch.arange(self.num_examples, device=ids.device)[:, None].expand_as(ids)  # (B, T)
        call = examples.flatten(), ids.flatten(), gradient.reshape(-1, gradient.shape[-1])  # (B T,) twice, (B T, D)
        if self._padding is not None:
            counts = call[1] != self._padding  # (B T,)
            call = call[0][counts], call[1][counts], call[2][counts]
        self._calls.append(call)

    def squared_norms(self) -> Tensor:
        """Return (B,) float64."""
        if not self._calls:
            return self.zero_norms()
        examples, ids, gradients = (torch.cat(part) for part in zip(*self._calls, strict=True))
        self._calls.clear()
        self._pairs = RowPairs(examples, ids, num_examples=self.num_examples, num_rows=len(self.parameter))
        self._rows = self._pairs.sums(examples, ids, gradients)
        return self._pairs.squared_norms(self._rows)

    def weighted_sums(self, factors: Tensor) -> Mapping[str, Tensor]:
        """Return the weighted sum (V, D)."""
        if (pairs := self._pairs) is None:
            return {}
        weights, ids, rows = accepted(factors[pairs.examples], pairs.ids, self._rows)  # (P',), (P',), (P', D)
        return {self.name: torch.zeros_like(self.parameter).index_add_(0, ids, rows * weights[:, None])}
