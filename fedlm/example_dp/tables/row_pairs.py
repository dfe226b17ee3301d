"""Which rows of a table each example touches by name: distinct (example, row) pairs, and sums over them.

Legend: B examples, u distinct pairs, C columns of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RowPairs:
    """The distinct pairs among some (example, row) pairs, sorted by example and then by row.

    Arguments:
        examples: (n,) int64, each in [0, B).
        ids: (n,) int64, each in [0, num_rows).
        num_examples: B.
        num_rows: Rows of the table.
    """

    def __init__(self, examples: Tensor, ids: Tensor, *, num_examples: int, num_rows: int) -> None:
        self.num_examples = num_examples
        self._num_rows = num_rows
        self._keys = torch.unique(examples * num_rows + ids)  # (u,) sorted
        self.examples = self._keys // max(num_rows, 1)  # (u,)
        self.ids = self._keys % max(num_rows, 1)  # (u,)
        self._bounds: list[int] = self.starts([0])[0]

    def __len__(self) -> int:
        return len(self._keys)

    def span(self, example: int) -> slice:
        """Return where this example's pairs stand."""
        return slice(self._bounds[example], self._bounds[example + 1])

    def slots(self, examples: Tensor, ids: Tensor) -> Tensor:
        """Return where these pairs (n,), all of them known, stand: (n,)."""
        return torch.searchsorted(self._keys, examples * self._num_rows + ids)

    def starts(self, rows: list[int]) -> list[list[int]]:
        """Return for each row r the first pair of each example whose row is at least r; one more, u, closes a list."""
        first = torch.arange(self.num_examples, device=self._keys.device) * self._num_rows  # (B,)
        found = torch.searchsorted(self._keys, first + torch.tensor(rows, device=first.device)[:, None])  # (rows, B)
        return [[*each, len(self)] for each in found.tolist()]

    def sums(self, examples: Tensor, ids: Tensor, gradients: Tensor) -> Tensor:
        """Return what each pair gets (u, C) of gradients (n, C) of pairs (n,), all of them known, with repeats."""
        rows = gradients.new_zeros(len(self), gradients.shape[1])  # (u, C)
        return rows.index_add_(0, self.slots(examples, ids), gradients)

    def squared_norms(self, rows: Tensor) -> Tensor:
        """Return the squared norm of each example's rows, (B,) float64; `rows` is (u, C)."""
        squares: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()  # (u,)
        return squares.new_zeros(self.num_examples).index_add_(0, self.examples, squares)
