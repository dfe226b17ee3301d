"""Streams of tokens as batches of next-token predictions; numpy alone.

Legend: B sequences in a batch, T tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlm.data.store import TokenStore
from fedlm.errors import DataError


@dataclass(frozen=True)
class Batch:
    """Next-token predictions; where `mask` is False, targets are 0 and do not count.

    Arguments:
        inputs: (B, T) int64; 0 where no token is.
        targets: (B, T) int64, the token after each input.
        mask: (B, T) bool, the targets that count.
        present: (B, T) bool, where tokens are, from the left on: a prompt is read, but not predicted. None: as `mask`.
    """

    inputs: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]
    present: npt.NDArray[np.bool_] | None = None

    @property
    def read(self) -> npt.NDArray[np.bool_]:
        """Where tokens are, (B, T) bool."""
        return self.mask if self.present is None else self.present

    @property
    def num_targets(self) -> int:
        """Targets that count."""
        return int(self.mask.sum())

    def select(self, rows: npt.NDArray[np.integer]) -> Batch:
        """Return some sequences, cut to the longest of them."""
        longest = int(self.read[rows].sum(axis=1).max(initial=0))
        present = None if self.present is None else self.present[rows, :longest]
        return Batch(self.inputs[rows, :longest], self.targets[rows, :longest], self.mask[rows, :longest], present)


def sequences(tokens: npt.NDArray[np.integer], length: int) -> Batch:
    """Cut one stream into windows, so that every token but the first is a target exactly once.

    Arguments:
        tokens: (n,) one user's stream.
        length: T, targets in a window.

    Returns:
        B = ceil((n - 1) / T) windows in order; only the last may be partly masked. B is 0 for n < 2.
    """
    num_targets = max(len(tokens) - 1, 0)
    shape = (-(-num_targets // length), length)  # (B, T)
    inputs, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    inputs.reshape(-1)[:num_targets] = tokens[:num_targets]
    targets.reshape(-1)[:num_targets] = tokens[1 : num_targets + 1]
    mask = (np.arange(inputs.size) < num_targets).reshape(shape)  # (B, T)
    return Batch(inputs, targets, mask)


def local_batches(
    tokens: npt.NDArray[np.integer],
    *,
    length: int,
    batch_size: int,
    epochs: int,
    generator: np.random.Generator,
) -> Iterator[Batch]:
    """Yield one device's training batches: shuffled in each epoch, each cut to its longest sequence.

    Arguments:
        tokens: (n,) the user's stream.
        length: T, targets in a sequence at most.
        batch_size: B; the last batch of an epoch may be smaller.
        epochs: Passes over all sequences.
        generator: Draws the order.
    """
    windows = sequences(tokens, length)
    for _ in range(epochs):
        order = generator.permutation(len(windows.inputs))  # (B,)
        for start in range(0, len(order), batch_size):
            yield windows.select(order[start : start + batch_size])


def evaluation_users(store: TokenStore, max_tokens: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return held-out users, whole, in a random order, until they have `max_tokens` tokens; at least one.

    Arguments:
        store: The corpus.
        max_tokens: Enough tokens; the last user may exceed it.
        generator: Draws the order. The same generator state gives the same users.

    Raises:
        DataError: The store has no held-out user.
    """
    users = generator.permutation(store.users("eval"))
    if len(users) == 0:
        raise DataError(f"no held-out user in {store.folder}; raise data.eval_fraction or add users")
    totals = np.cumsum(store.num_tokens[users])  # (U,)
    return users[: int(np.searchsorted(totals, max_tokens)) + 1]
