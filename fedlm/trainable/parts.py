"""A device's update as the few runs of coordinates in which it differs from zero.

A device touches some hundred embedding rows of the thousands in the round's set; the zeros of the others need neither
be written, nor be clipped, nor be added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlm.errors import DataError
from fedlm.trainable.spec import RowIds, UpdateSpec, Vector


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

    @property
    def stop(self) -> int:
        """The coordinate after the last one that the part can touch."""
        if self.rows is None:
            return self.offset + self.values.size
        return self.offset + (int(self.rows[-1]) + 1) * prod(self.values.shape[1:]) if len(self.rows) else self.offset

    def add_to(self, vector: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        """Add values of this part's shape to its coordinates of a vector (P,)."""
        target = vector[self.offset : self.stop].reshape(-1, *self.values.shape[1:])
        if self.rows is None:
            target += values
        else:
            target[self.rows] += values


def dense(parts: Sequence[Part], size: int) -> Vector:
    """Return the whole vector (P,) of an update in parts."""
    vector = np.zeros(size, np.float32)
    for part in parts:
        part.add_to(vector, part.values)
    return vector


def restricted(parts: Sequence[Part], trained: UpdateSpec, sent: UpdateSpec) -> list[Part]:
    """Return the parts of an update that lie in the blocks of another spec, at their places there.

    Arguments:
        parts: Runs that begin and end with blocks, and rows of single blocks, as local training gives them.
        trained: Where the parts lie.
        sent: Some of its blocks, with the same row set.
    """
    places = {block.name: block.offset for block in sent.blocks}
    found: list[Part] = []
    for part in parts:
        for block in trained.blocks:
            is_inside = part.offset <= block.offset and block.offset + block.size <= part.stop
            if block.name not in places:
                continue
            if part.rows is not None and block.offset == part.offset:
                found.append(replace(part, offset=places[block.name]))
            elif part.rows is None and is_inside:
                start = block.offset - part.offset
                found.append(Part(places[block.name], part.values[start : start + block.size]))
    return sorted(found, key=lambda part: part.offset)


def check_parts(parts: Sequence[Part], size: int) -> None:
    """Refuse parts that are not distinct coordinates of a vector (size,): the norm of an update would be wrong.

    Raises:
        DataError: Wrong types or shapes, rows that do not increase, parts that overlap or lie outside the vector.
    """
    done = 0
    for part in parts:
        values, rows = part.values, part.rows
        problem = ""
        if type(values) is not np.ndarray or values.dtype != np.float32 or values.ndim < 1:
            problem = "is not a plain float32 array"
        elif rows is None and values.ndim != 1:
            problem = f"is a run of shape {values.shape}, must be (n,)"
        elif rows is not None and not _are_rows(rows, len(values)):
            problem = "has rows that are not increasing int64 numbers, one for each row of values"
        elif part.offset < done or part.stop > size:
            problem = f"spans [{part.offset}, {part.stop}), must lie within [{done}, {size})"
        if problem:
            raise DataError(f"a part of an update {problem}")
        done = part.stop


def _are_rows(rows: RowIds, count: int) -> bool:
    if type(rows) is not np.ndarray or rows.dtype != np.int64 or rows.shape != (count,):
        return False
    return not count or bool(rows[0] >= 0 and (np.diff(rows) > 0).all())
