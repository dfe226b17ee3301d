"""Canary devices: members of the fleet whose contribution the auditor knows (Andrew et al. 2024, 2302.03098).

A gradient canary j contributes C c_j, C the clip norm and c_j = (+-1, ..., +-1) / sqrt(P) a direction of fair coins. In
many dimensions such directions are nearly orthogonal to each other and to everything else, so one run holds many
canaries that hardly disturb each other or the model. A text canary holds a random phrase (`fedlm.auditing.text`)
and trains on it as any device does.

All of it follows from (seed, number of the canary): nothing is stored, and who analyses the run draws it again. A coin
of each canary says whether it is a member. One that is not is sampled like the others and contributes zero: it shows
what the scores of strangers look like.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from fedlm.randomness import seed_key, stream
from fedlm.trainable.spec import Block, RowIds, UpdateSpec, Vector

_BATCH_COORDINATES = 2**24


@dataclass(frozen=True)
class Canaries:
    """Which devices are canaries, and what the gradient canaries contribute.

    Arguments:
        seed: The experiment's.
        first_device: Id of canary 0; the canaries are the last devices of the fleet.
        num_gradient: k gradient canaries, first.
        num_text: Text canaries, after them.
    """

    seed: int
    first_device: int
    num_gradient: int
    num_text: int

    @property
    def count(self) -> int:
        """Canaries of both kinds."""
        return self.num_gradient + self.num_text

    def number(self, device: int) -> int | None:
        """Return which canary a device is, from 0; None for a real device."""
        return device - self.first_device if device >= self.first_device else None

    def is_text(self, number: int) -> bool:
        """Tell whether this canary holds a phrase."""
        return number >= self.num_gradient

    def is_member(self, number: int) -> bool:
        """Return the fair coin of a canary: whether it contributes at all."""
        return bool(stream(seed_key(self.seed), "canary/coin", number).random() < 0.5)

    def members(self) -> npt.NDArray[np.bool_]:
        """Return the coins of all canaries (k + text canaries,)."""
        return np.array([self.is_member(number) for number in range(self.count)], np.bool_)

    def signs(self, number: int, spec: UpdateSpec) -> Vector:
        """Return sqrt(P) c_j, a vector (P,) of +1 and -1, in the coordinates of a round.

        A coordinate has the same sign in every round whose row set holds it.

        Arguments:
            number: j.
            spec: Of the round, or of any other choice of rows.
        """
        whole = {block.name: block for block in (spec.full or spec).blocks}
        drawn = [self._block_signs(number, whole[b.name], _rows_of(b, spec)) for b in spec.blocks]
        return np.concatenate(drawn)

    def batches(self, spec: UpdateSpec) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
        """Yield the signs of the gradient canaries, some canaries (B, P) at a time, with their numbers."""
        step = max(1, _BATCH_COORDINATES // spec.size)
        for start in range(0, self.num_gradient, step):
            numbers = range(start, min(start + step, self.num_gradient))
            yield slice(numbers.start, numbers.stop), np.stack([self.signs(j, spec) for j in numbers])

    def _block_signs(self, number: int, block: Block, rows: RowIds | None) -> Vector:
        """Return the signs of one block, or of some rows of it; a row begins with a new byte of the stream."""
        num_rows, width = (block.shape[0], prod(block.shape[1:])) if block.kind == "rows" else (1, block.size)
        generator = stream(seed_key(self.seed), f"canary/{block.name}", number)
        coins = np.frombuffer(generator.bytes(num_rows * -(-width // 8)), np.uint8).reshape(num_rows, -1)
        bits = np.unpackbits(coins if rows is None else coins[rows], axis=1, count=width)  # (rows, width)
        return (2 * bits.reshape(-1).astype(np.float32)) - 1


def _rows_of(block: Block, spec: UpdateSpec) -> RowIds | None:
    return spec.row_ids if block.kind == "rows" else None
