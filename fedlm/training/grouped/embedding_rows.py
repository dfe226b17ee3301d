"""The embedding rows of a group of devices: common rows where none train, else each device's own copies in one pool.

A device's copies are the rows that its text and its negatives touch, each once; all devices' copies lie in one tensor,
so that a lookup of the whole group is one gather and a step of SGD one scatter.

No device reads what another can write. Behind the copies lie two rows that belong to nobody: padding reads the first,
zeros that nothing writes; the gradients of whatever does not train go to the second, which lies outside the tables that
lookups see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from fedlm.models.base import LanguageModel
from fedlm.models.table_names import INPUT_TABLE, OUTPUT_BIAS, OUTPUT_TABLE
from fedlm.trainable.parts import Part
from fedlm.trainable.spec import RowIds, UpdateSpec
from fedlm.training.device_batches import RoundWork


@dataclass(frozen=True)
class Places:
    """Where a device's words stand in the group's tables.

    Arguments:
        of: (n,) place of each occurrence that was opened.
        ids: (L,) the device's distinct words.
        start: Place of the first of them; they stand in this order.
    """

    of: RowIds
    ids: RowIds
    start: int


class CommonRows:
    """The model's own tables, in which nothing trains: a word's place is its id."""

    train = False
    padding = 0  # a word like any other, which nothing writes

    def __init__(self, model: LanguageModel, work: RoundWork) -> None:
        self.input, self.output, self.bias = model.input_table, model.output_table, model.output_bias
        self.log_expected = work.log_expected

    def open(self, occurrences: Sequence[RowIds]) -> list[Places]:
        """Return where each device's words stand."""
        nothing = np.empty(0, np.int64)
        return [Places(ids, nothing, 0) for ids in occurrences]

    def descend(self, name: str, places: Tensor, gradient: Tensor, rate: float) -> None:
        """Nothing trains."""

    def parts(self, places: Places, spec: UpdateSpec) -> list[Part]:
        """Return no change."""
        return []


class OwnRows:
    """Copies of rows, some of which train.

    Arguments:
        model: Whose tables are copied.
        work: The round.
    """

    train = True

    def __init__(self, model: LanguageModel, work: RoundWork) -> None:
        self._slot, self._log_expected = work.slot, work.log_expected
        self._local = np.empty(len(work.slot), np.int64)  # (V,) scratch
        self._sources = tables_of(model)

    def open(self, occurrences: Sequence[RowIds]) -> list[Places]:
        """Copy each device's rows; return where they stand.

        Arguments:
            occurrences: (n,) word ids of each device, with repetitions.
        """
        opened: list[Places] = []
        start = 0
        for ids in occurrences:
            opened.append(Places(*self._distinct(ids, start), start))
            start += len(opened[-1].ids)
        self._fill(np.concatenate([places.ids for places in opened]))
        return opened

    def descend(self, name: str, places: Tensor, gradient: Tensor, rate: float) -> None:
        """Take a step of SGD on rows, wherever they train.

        Arguments:
            name: Of the table.
            places: (...) with repetitions.
            gradient: (..., D), or (...) for the bias.
            rate: Learning rate.
        """
        descend_at(self._tables[name], self._target[places.view(-1)], gradient, rate)

    def parts(self, places: Places, spec: UpdateSpec) -> list[Part]:
        """Return how a device's rows of the round's set have changed.

        Arguments:
            places: What `open` returned for the device.
            spec: The round's spec.
        """
        slots = self._slot[places.ids]  # (L,)
        order = np.argsort(slots)[np.count_nonzero(slots < 0) :]  # (R,) those of the set, as it is sorted
        now = torch.from_numpy(order + places.start)
        then = torch.from_numpy(places.ids[order])
        blocks = {block.name: block for block in spec.row_blocks}
        return [
            Part(blocks[name].offset, (self._tables[name][now] - source[then]).numpy(), slots[order])
            for name, source in self._sources.items()
        ]

    def _distinct(self, ids: RowIds, start: int) -> tuple[RowIds, RowIds]:
        """Return the place of each occurrence (n,) and the distinct words (L,), without sorting."""
        self._local[ids] = np.arange(len(ids))  # of repeated words the last place stays
        distinct = ids[self._local[ids] == np.arange(len(ids))]
        self._local[distinct] = np.arange(start, start + len(distinct))
        return self._local[ids], distinct

    def _fill(self, ids: RowIds) -> None:
        index = torch.from_numpy(ids)
        trains = torch.from_numpy(self._slot[ids] >= 0)  # (L,)
        self.padding, sink = len(ids), len(ids) + 1
        self._target = torch.where(trains, torch.arange(len(ids)), sink)
        self._target = torch.cat([self._target, self._target.new_tensor([sink])])  # of the copies and of padding
        self.log_expected = _with_zeros(self._log_expected[index], 1)
        self._tables = {name: _with_zeros(embedding_of(source, index), 2) for name, source in self._sources.items()}
        readable = {name: table[:sink] for name, table in self._tables.items()}
        self.input = readable[INPUT_TABLE]
        self.output = readable.get(OUTPUT_TABLE, self.input)
        self.bias = readable.get(OUTPUT_BIAS)


def descend_at(table: Tensor, places: Tensor, gradient: Tensor, rate: float) -> None:
    """Subtract rate * gradient from the rows of a table, in place.

    Arguments:
        table: (L, D), or the biases (L,).
        places: (M,) with repetitions.
        gradient: M times what a row has.
        rate: Learning rate.
    """
    if table.dim() > 1:
        table.index_add_(0, places, gradient.reshape(-1, *table.shape[1:]), alpha=-rate)
    else:
        # Biases are large (log frequencies) and steps small: added one by one, each would be rounded to the bias.
        step = torch.zeros_like(table).index_add_(0, places, gradient.reshape(-1))
        table.sub_(step, alpha=rate)


def tables_of(model: LanguageModel) -> dict[str, Tensor]:
    """Return the model's tables by the names of their blocks."""
    tables = {INPUT_TABLE: model.input_table}
    if not model.tied:
        tables[OUTPUT_TABLE] = model.output_table
    if model.output_bias is not None:
        tables[OUTPUT_BIAS] = model.output_bias
    return tables


def embedding_of(table: Tensor, index: Tensor) -> Tensor:
    """Return table[index] for a table (L, D) or a bias (L,)."""
    return embedding(index, table) if table.dim() == 2 else table[index]


def _with_zeros(rows: Tensor, num_more: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(num_more, *rows.shape[1:])])
