"""One device's local training: the reference program (METHODS.md section 1).

The device takes the current model, trains on its own text with plain SGD and returns the difference. It works on a
compact table: only the embedding rows that its text and its negatives touch are copied, and only those of the round's
public row set move. Rows of the set that it does not touch are zeros in its update, which has the same length for
every device.

With a loss over the whole vocabulary every word is in play, and the compact table is the whole one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import embedding

from fedlm.config.schema import Config
from fedlm.data.batching import Batch
from fedlm.losses.loss import loss_of
from fedlm.models.table_names import INPUT_TABLE, OUTPUT_BIAS, OUTPUT_TABLE
from fedlm.trainable.build import Trainable
from fedlm.trainable.spec import RowIds, UpdateSpec, Vector
from fedlm.training.device_batches import DeviceWork, RoundWork


@dataclass(frozen=True)
class LocalResult:
    """What one device's training gives.

    Arguments:
        update: (P,) new minus old values, before clipping.
        loss: Mean training loss over the device's steps; never leaves the device except as a non-private diagnostic.
        num_tokens: Targets trained on.
    """

    update: Vector
    loss: float
    num_tokens: int


class LocalTrainer:
    """Trains devices one at a time on a model in this process.

    Arguments:
        trainable: The model and what trains in it; its tables must be bound to the current blocks.
        config: The experiment.
        frequencies: Public word frequencies (V,).
    """

    def __init__(self, trainable: Trainable, config: Config, frequencies: npt.NDArray[np.float64]) -> None:
        self._trainable = trainable
        self._config = config
        self._frequencies = frequencies
        self._kind = loss_of(config.loss)
        self._local_index = torch.zeros(trainable.model.vocabulary_size, dtype=torch.int64)  # (V,) scratch

    def start_round(self, spec: UpdateSpec, blocks: Mapping[str, Vector]) -> None:
        """Prepare for the devices of one round.

        Arguments:
            spec: What moves in the round.
            blocks: Current values of everything that may train: the blocks of the full spec, by name.
        """
        self._round = RoundWork(self._trainable.model, self._config, self._frequencies, spec, blocks)

    def train(self, tokens: npt.NDArray[np.int32], *, key: bytes, device: int) -> LocalResult:
        """Train one device.

        Arguments:
            tokens: The device's token stream (n,).
            key: The round's key.
            device: The device's number; with the key it decides shuffling, negatives and dropout.

        Returns:
            The device's update, not clipped yet.
        """
        work = self._round.of(tokens, key=key, device=device)
        self._trainable.model.seed_dropout(work.dropout_seed)
        self._trainable.load(self._round.blocks)
        self._trainable.model.train()
        tables = self._compact_tables(work)
        losses, num_tokens = [], 0
        for step, batch in enumerate(work.batches):
            loss, count = self._step(tables, batch, work.negatives[step] if work.negatives else None)
            losses.append(loss)
            num_tokens += count
        return LocalResult(self._update(tables), float(np.mean(losses)) if losses else 0.0, num_tokens)

    def _compact_tables(self, work: DeviceWork) -> _CompactTables:
        model = self._trainable.model
        if not self._kind.draws_negatives:
            ids = np.arange(model.vocabulary_size)
        else:
            used = [a.ravel() for b in work.batches for a in (b.inputs, b.targets)] + work.negatives
            ids = np.unique(np.concatenate(used)) if used else np.empty(0, np.int64)
        moving = self._round.slot[ids] >= 0
        ids = np.concatenate([ids[moving], ids[~moving]])  # (L,) rows of the round's set first
        self._local_index[torch.from_numpy(ids)] = torch.arange(len(ids))
        return _CompactTables(self._trainable, ids, int(moving.sum()))

    def _step(self, tables: _CompactTables, batch: Batch, negatives: RowIds | None) -> tuple[float, int]:
        """One SGD step; returns the loss and the number of targets."""
        model, index = self._trainable.model, self._local_index
        inputs = index[torch.from_numpy(batch.inputs)]  # (B, T)
        mask = torch.from_numpy(batch.mask)  # (B, T)
        counted = torch.from_numpy(self._round.counted(batch))  # (B, T)
        targets = index[torch.from_numpy(batch.targets)[counted]]  # (N,)
        if not len(targets):
            return 0.0, 0
        noise = model.row_noise(torch.from_numpy(batch.inputs))  # (B, T) or None
        hidden = model.body(model.embed(embedding(inputs, tables.input)), mask, noise)[counted]  # (N, D)
        loss = self._loss(hidden, targets, tables, negatives)
        if not loss.requires_grad:
            return float(loss), len(targets)
        self._descend(loss, tables)
        return float(loss.detach()), len(targets)

    def _descend(self, loss: Tensor, tables: _CompactTables) -> None:
        local = self._config.local
        parameters = (self._trainable.parameters[name] for name in self._round.parameters)
        fixed: list[tuple[Tensor, Tensor, float]] = [(p, p, local.learning_rate) for p in parameters]
        leaves = fixed + tables.leaves(local.learning_rate, local.row_learning_rate)
        gradients = torch.autograd.grad(loss, [leaf for leaf, _, _ in leaves], allow_unused=True)
        with torch.no_grad():
            for (_, moving, rate), gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    moving.sub_(gradient[: len(moving)], alpha=rate)

    def _loss(self, hidden: Tensor, targets: Tensor, tables: _CompactTables, negatives: RowIds | None) -> Tensor:
        if negatives is None:
            return self._kind.mean(hidden, targets, None, tables.output, tables.bias, None)
        local_negatives = self._local_index[torch.from_numpy(negatives)]  # (K,)
        log_expected = self._round.log_expected[tables.ids]  # (L,)
        return self._kind.mean(hidden, targets, local_negatives, tables.output, tables.bias, log_expected)

    @torch.no_grad()
    def _update(self, tables: _CompactTables) -> Vector:
        update = np.zeros(self._round.spec.size, np.float32)
        views = self._round.spec.views(update)
        for name in self._round.parameters:
            np.subtract(self._trainable.parameters[name].numpy(), self._round.blocks[name], out=views[name])
        slots = self._round.slot[tables.ids[: tables.num_moving].numpy()]
        for name, moved in tables.moved():
            views[name][slots] = moved.numpy()
        return update


class _CompactTables:
    """Copies of the embedding rows in play; the first `num_moving` train."""

    def __init__(self, trainable: Trainable, ids: RowIds, num_moving: int) -> None:
        model = trainable.model
        self.ids = torch.from_numpy(ids)  # (L,)
        self.num_moving = num_moving
        self._sources = {INPUT_TABLE: model.input_table}
        if not model.tied:
            self._sources[OUTPUT_TABLE] = model.output_table
        if model.output_bias is not None:
            self._sources[OUTPUT_BIAS] = model.output_bias
        trains = num_moving > 0
        self._local = {name: t[self.ids].requires_grad_(trains) for name, t in self._sources.items()}
        self.input = self._local[INPUT_TABLE]  # (L, D)
        self.output = self._local.get(OUTPUT_TABLE, self.input)  # (L, D)
        self.bias = self._local.get(OUTPUT_BIAS)  # (L,) or None

    def leaves(self, rate: float, row_rate: float) -> list[tuple[Tensor, Tensor, float]]:
        """Each table to differentiate, the part of it that moves, and its learning rate."""
        if not self.num_moving:
            return []
        rates = {INPUT_TABLE: row_rate, OUTPUT_TABLE: row_rate, OUTPUT_BIAS: rate}
        return [(t, t.detach()[: self.num_moving], rates[name]) for name, t in self._local.items()]

    def moved(self) -> Iterator[tuple[str, Tensor]]:
        """The change of each table's moving rows."""
        if self.num_moving:
            head = self.ids[: self.num_moving]
            for name, local in self._local.items():
                yield name, local[: self.num_moving] - self._sources[name][head]
