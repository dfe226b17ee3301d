"""The update vector: one flat fp32 vector with named blocks.

LoRA factors, biases, dense tensors and embedding rows are all blocks of one vector; clipping, summing, noise, server
optimisers, payload figures and the wire format see only the spec and the vector (METHODS.md section 1).

The *full* spec has every coordinate that the server may change, with all V rows of the embedding; the server's state
and the optimiser's moments live there. A *round* spec, `full.with_rows(row_ids)`, keeps only the rows of the round's
public row set, and only the named blocks where a round trains, sends or changes some (`fedlm.strategies.Strategy`).

>>> import numpy as np
>>> full = UpdateSpec.build([("w", "dense", (2,)), ("input_table", "rows", (4, 3))])
>>> round_spec = full.with_rows(np.array([1, 3]))
>>> full.size, round_spec.size
(14, 8)
>>> round_spec.gather(np.arange(14, dtype=np.float32)).tolist()
[0.0, 1.0, 5.0, 6.0, 7.0, 11.0, 12.0, 13.0]
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from types import EllipsisType
from typing import Literal

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]
RowIds = npt.NDArray[np.int64]
BlockKind = Literal["lora_a", "lora_b", "bias", "dense", "rows"]


@dataclass(frozen=True)
class Block:
    """A named piece of the update vector.

    Arguments:
        name: The model's parameter or table that it stands for.
        kind: What it is; `rows` blocks have one row for each row of the row set.
        shape: Shape in this spec; `(S, ...)` for `rows`.
        offset: First coordinate in the vector.
    """

    name: str
    kind: BlockKind
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return prod(self.shape)

    def view(self, vector: Vector) -> Vector:
        """Return the block's part of `vector`, shaped, sharing its memory."""
        return vector[self.offset : self.offset + self.size].reshape(self.shape)


@dataclass(frozen=True, eq=False)
class UpdateSpec:
    """The blocks of an update vector, in order.

    Arguments:
        blocks: Contiguous, in the order of the vector.
        row_ids: Sorted ids (S,) of the rows that the `rows` blocks hold; None for every row.
        full: The spec of all rows, when this one holds a subset.
    """

    blocks: tuple[Block, ...]
    row_ids: RowIds | None = None
    full: UpdateSpec | None = None

    @classmethod
    def build(cls, parts: Iterable[tuple[str, BlockKind, tuple[int, ...]]]) -> UpdateSpec:
        """Lay out `(name, kind, shape)` parts one after another."""
        blocks: list[Block] = []
        offset = 0
        for name, kind, shape in parts:
            blocks.append(Block(name, kind, tuple(shape), offset))
            offset += blocks[-1].size
        return cls(tuple(blocks))

    @classmethod
    def flat(cls, size: int) -> UpdateSpec:
        """Return the spec of a vector (size,) that is one dense block."""
        return cls.build([("update", "dense", (size,))])

    def with_rows(self, row_ids: RowIds, names: Collection[str] | None = None) -> UpdateSpec:
        """Return the spec of one round, whose `rows` blocks hold only `row_ids` (sorted, unique).

        Arguments:
            row_ids: The round's row set (S,).
            names: The blocks that take part; None: all.
        """
        assert self.full is None, "rows are selected from the full spec"
        chosen = [block for block in self.blocks if names is None or block.name in names]
        parts = [(b.name, b.kind, (len(row_ids), *b.shape[1:]) if b.kind == "rows" else b.shape) for b in chosen]
        return replace(UpdateSpec.build(parts), row_ids=row_ids, full=self)

    @cached_property
    def size(self) -> int:
        """Number of coordinates, P."""
        return sum(block.size for block in self.blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks' names, in order."""
        return tuple(block.name for block in self.blocks)

    @property
    def num_bytes(self) -> int:
        """Bytes of the vector on the wire (fp32)."""
        return 4 * self.size

    @property
    def row_blocks(self) -> tuple[Block, ...]:
        """The blocks whose first dimension is the row set."""
        return tuple(block for block in self.blocks if block.kind == "rows")

    @property
    def row_size(self) -> int:
        """Coordinates that belong to one row of the row set, over all `rows` blocks."""
        return sum(prod(block.shape[1:]) for block in self.row_blocks)

    @property
    def fixed_size(self) -> int:
        """Coordinates outside the `rows` blocks."""
        return self.size - sum(block.size for block in self.row_blocks)

    def bytes_by_kind(self) -> dict[str, int]:
        """Payload bytes of each kind of block."""
        totals: dict[str, int] = {}
        for block in self.blocks:
            totals[block.kind] = totals.get(block.kind, 0) + 4 * block.size
        return totals

    def views(self, vector: Vector) -> dict[str, Vector]:
        """Return every block of `vector` by name, shaped, sharing its memory."""
        assert vector.shape == (self.size,), f"expected ({self.size},), got {vector.shape}"
        return {block.name: block.view(vector) for block in self.blocks}

    def gather(self, full_vector: Vector) -> Vector:
        """Return this spec's coordinates (P,) out of a vector of the full spec."""
        out = np.empty(self.size, np.float32)
        sources = (self.full or self).views(full_vector)
        for block in self.blocks:
            block.view(out)[...] = sources[block.name][self._place(block)]
        return out

    def scatter(self, full_vector: Vector, vector: Vector) -> None:
        """Write this spec's coordinates (P,) into a vector of the full spec, in place; other rows stay untouched."""
        self.scatter_blocks((self.full or self).views(full_vector), vector)

    def scatter_blocks(self, blocks: Mapping[str, Vector], vector: Vector) -> None:
        """Write this spec's coordinates (P,) into the full spec's blocks by name, wherever each of them lies."""
        assert vector.shape == (self.size,), f"expected ({self.size},), got {vector.shape}"
        for block in self.blocks:
            blocks[block.name][self._place(block)] = block.view(vector)

    def _place(self, block: Block) -> RowIds | EllipsisType:
        """Where the block's coordinates lie in the full spec's block of this name."""
        return ... if self.row_ids is None or block.kind != "rows" else self.row_ids
