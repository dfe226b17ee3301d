"""A device's update as the few runs of coordinates in which it can differ from zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlm.trainable.spec import RowIds, Vector


@dataclass(frozen=True)
class Part:
    """Coordinates of an update vector: a run of them, or rows of a block.

    Arguments:
        offset: First coordinate of the run, or of the block.
        values: (n,) the run, or the rows (R, ...).
        rows: (R,) which rows of the block they are, increasing; None for a run.
    """

    offset: int
    values: Vector
    rows: RowIds | None = None


def dense(parts: Sequence[Part], size: int) -> Vector:
    """Return the whole vector (P,) of an update in parts."""
    vector = np.zeros(size, np.float32)
    for part in parts:
        if part.rows is None:
            vector[part.offset : part.offset + part.values.size] = part.values.ravel()
        else:
            width = part.values[0].size if len(part.values) else 1
            index = part.offset + part.rows[:, None] * width + np.arange(width)  # (R, width)
            vector[index] = part.values.reshape(index.shape)
    return vector
