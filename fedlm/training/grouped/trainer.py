"""The local training of a group of devices as one batched program.

The update of each device is that of `local.py` up to rounding: the same batches, negatives and dropout masks, the
same plain SGD. The frozen base multiplies the tokens of all devices at once, LoRA factors, biases and rows are batched
beside it, and a device without batches left drops out of the group, which stands in the order of the devices' steps.

What the batched program cannot do (`why_not_grouped`) is left to `local.py`.

Shape legend: G devices, S sequences of one device in a step, T tokens, N targets of one device (padded), K negatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import embedding

from fedlm.config.schema import Config
from fedlm.data.batching import Batch
from fedlm.losses.grouped import full_losses
from fedlm.losses.loss import loss_of
from fedlm.models.table_names import INPUT_TABLE, OUTPUT_BIAS, OUTPUT_TABLE
from fedlm.registry import LOSSES
from fedlm.trainable.build import Trainable
from fedlm.trainable.parts import Part
from fedlm.trainable.spec import RowIds, UpdateSpec, Vector
from fedlm.training.device_batches import DeviceWork, RoundWork
from fedlm.training.grouped.embedding_rows import CommonRows, OwnRows
from fedlm.training.grouped.layers import DeviceBatch, group_body, unknown_tensors
from fedlm.training.grouped.whole_table import WholeTable

MOST_SCORES = 2**27  # (N, V) that a device with a whole table of its own may hold: 512 MiB


@dataclass(frozen=True)
class GroupResult:
    """What one device of a group gives; see `fedlm.training.local.LocalResult`.

    Arguments:
        parts: The update, before clipping.
        loss: Mean training loss over the device's steps.
        num_tokens: Targets trained on.
    """

    parts: list[Part]
    loss: float
    num_tokens: int


def why_not_grouped(trainable: Trainable, config: Config) -> str:
    """Return why the devices of this experiment have to train one by one; empty when they need not."""
    if unknown := unknown_tensors(trainable):
        return f"groups cannot train {unknown[0]} ({len(unknown)} such tensors)"
    if not LOSSES.resolve(config.loss.kind).has_groups:
        return f"loss.kind = {config.loss.kind!r} has no form for groups of devices"
    if config.local.example_dp.enabled:
        return "example-level DP clips each of a device's sequences by itself"
    if config.model.re_attention != "off":
        return "groups cannot propagate the variances of Re-Attention: their weights differ from device to device"
    scores = config.local.batch_size * config.data.sequence_length * trainable.model.vocabulary_size
    if _needs_whole_table(config) and scores > MOST_SCORES:
        return f"the scores of a batch, {4 * scores / 2**20:.0f} MiB, are more than {4 * MOST_SCORES / 2**20:.0f}"
    return ""


def _needs_whole_table(config: Config) -> bool:
    return not LOSSES.resolve(config.loss.kind).draws_negatives and config.trainable.embedding_rows.count > 0


class GroupTrainer:
    """Trains groups of devices on a model in this process.

    Arguments:
        trainable: The model and what trains in it; its tables must be bound to the current blocks.
        config: The experiment.
        frequencies: Public word frequencies (V,).
    """

    def __init__(self, trainable: Trainable, config: Config, frequencies: npt.NDArray[np.float64]) -> None:
        assert not why_not_grouped(trainable, config)
        self._trainable, self._config, self._frequencies = trainable, config, frequencies
        self._loss = loss_of(config.loss)
        self._table = WholeTable(trainable.model) if _needs_whole_table(config) else None
        self.largest_group = 1 if self._table else config.execution.group_size
        self._moving: list[str] | None = None

    def start_round(self, spec: UpdateSpec, blocks: Mapping[str, Vector]) -> None:
        """Prepare for the devices of one round; see `LocalTrainer.start_round`."""
        self._round = RoundWork(self._trainable.model, self._config, self._frequencies, spec, blocks)
        self._build_body()
        if self._table is not None:
            self._table.start_round(self._round)

    def _build_body(self) -> None:
        """Exchange the model's leaves, unless the last round's will do.

        What may train but does not move in this round is frozen at its current values.
        """
        moving, is_rounded = self._round.parameters, self._config.execution.products == "bf16"
        some_rest = len(moving) < len(self._trainable.parameters)
        if some_rest:
            self._trainable.load(self._round.blocks)
        if moving != self._moving or (some_rest and is_rounded):  # rounded copies of frozen weights may be old
            self._group = DeviceBatch(self._trainable, moving, self.largest_group, is_rounded=is_rounded)
            self._body = group_body(self._trainable.model, self._group)
            self._moving = moving

    def train(
        self, tokens: Sequence[npt.NDArray[np.int32]], *, key: bytes, devices: Sequence[int]
    ) -> list[GroupResult]:
        """Train a group.

        Arguments:
            tokens: Each device's token stream (n,); at most `largest_group` of them.
            key: The round's key.
            devices: Their numbers.

        Returns:
            A result for each device, in the same order.
        """
        work = [self._round.of(text, key=key, device=d) for text, d in zip(tokens, devices, strict=True)]
        order = sorted(range(len(work)), key=lambda g: -len(work[g].batches))  # stable
        program = _Program(self, [work[g] for g in order])
        results = program.run()
        return [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]


class _Program:
    """One run of the batched program, over devices in the order of their steps, most first."""

    def __init__(self, trainer: GroupTrainer, work: Sequence[DeviceWork]) -> None:
        self._config, self._round = trainer._config, trainer._round
        self._loss = trainer._loss
        self._body, self._group = trainer._body, trainer._group
        self._work = work
        model = trainer._trainable.model
        kind = OwnRows if self._round.spec.row_blocks else CommonRows
        table = trainer._table if self._round.spec.row_blocks else None
        self._rows: CommonRows | OwnRows | WholeTable = table or kind(model, self._round)
        self._output_name = OUTPUT_TABLE if not model.tied else INPUT_TABLE
        self._places = self._rows.open([_occurrences(w) for w in work])
        self._read = [0] * len(work)  # occurrences of each device that its steps have used
        self._losses: list[list[float]] = [[] for _ in work]
        self._counts = [0] * len(work)
        self._group.load(self._round.blocks)
        self._group.dropouts = [torch.Generator().manual_seed(w.dropout_seed) for w in work]

    def run(self) -> list[GroupResult]:
        """Take every step; return the devices' results."""
        num_steps = max((len(w.batches) for w in self._work), default=0)
        for step in range(num_steps):
            self._step(step, sum(len(w.batches) > step for w in self._work))
        changes = self._group.changes(len(self._work))  # (G, F)
        return [self._result(g, changes[g]) for g in range(len(self._work))]

    def _step(self, step: int, num_active: int) -> None:
        batches = [w.batches[step] for w in self._work[:num_active]]
        self._group.start_step(num_active, [b.inputs.shape for b in batches])
        places = [self._take(g, batch) for g, batch in enumerate(batches)]
        S, T = (max(b.inputs.shape[axis] for b in batches) for axis in (0, 1))
        counted = [self._round.counted(b) for b in batches]  # (B, T) each
        real = _real(counted, (S, T))  # (G, N) places in the (G S T) hidden states
        counts = torch.tensor([int(c.sum()) for c in counted])  # (G,)
        if real.shape[1]:
            inputs = _stacked([p.inputs for p in places], (S, T), self._rows.padding)  # (G, S, T)
            x = embedding(inputs.view(-1, T), self._rows.input)  # (G S, T, D)
            x.requires_grad_(self._rows.train)
            mask = _stacked([b.mask for b in batches], (S, T), False)  # (G, S, T)
            hidden = self._body.body(self._body.embed(x), mask.view(-1, T))  # (G S, T, D)
            # Padding of the targets reads a state that may not be finite: zero it here, on the way forward and back.
            is_padding = torch.arange(real.shape[1]) >= counts[:, None]  # (G, N)
            states = embedding(real, hidden.flatten(0, 1)).masked_fill(is_padding[..., None], 0)  # (G, N, D)
            targets = [p.targets[c] for p, c in zip(places, counted, strict=True)]
            losses = self._descend(_Leaf(INPUT_TABLE, inputs, x), states, counts, targets, places)
        else:
            losses = torch.zeros(num_active)
        for g, (loss, count) in enumerate(zip(losses.tolist(), counts.tolist(), strict=True)):
            self._losses[g].append(loss)
            self._counts[g] += count

    def _take(self, g: int, batch: Batch) -> _StepPlaces:
        """Return where a device's words of its next step stand."""
        size = batch.inputs.size
        num_negatives = self._config.loss.negatives if self._loss.draws_negatives else 0
        start = self._read[g]
        self._read[g] = start + 2 * size + num_negatives
        own = self._places[g].of[start : self._read[g]]
        shape = batch.inputs.shape
        return _StepPlaces(own[:size].reshape(shape), own[size : 2 * size].reshape(shape), own[2 * size :])

    def _descend(
        self, inputs: _Leaf, states: Tensor, counts: Tensor, targets: list[RowIds], places: list[_StepPlaces]
    ) -> Tensor:
        """Take the step of SGD; returns the losses (G,)."""
        N = states.shape[1]
        target = _stacked(targets, (N,), self._rows.padding)  # (G, N)
        is_real = torch.arange(N) < counts[:, None]  # (G, N)
        weights = is_real / counts.clamp(min=1)[:, None]  # (G, N)
        local, leaves = self._config.local, list[_Leaf]()
        if isinstance(self._rows, WholeTable):
            losses = self._rows.loss(
                states[0], target[0], weights[0], chunk=self._config.loss.chunk,
                row_rate=local.row_learning_rate, rate=local.learning_rate,
            )[None]  # fmt: skip
        elif not self._loss.draws_negatives:
            losses = full_losses(states, weights, target, self._rows.output, self._rows.bias, self._config.loss.chunk)
        else:
            negative = torch.from_numpy(np.stack([p.negatives for p in places]))  # (G, K)
            losses, leaves = self._sampled(states, weights, target, negative)
        if losses.requires_grad:
            losses.sum().backward()  # type: ignore[no-untyped-call]
        idle = torch.nonzero(counts == 0)[:, 0]  # devices that take no step, as if they were alone
        self._group.descend(local.learning_rate, idle)
        for leaf in [inputs, *leaves] if self._rows.train else ():
            if leaf.rows.grad is None:  # a loss of somebody's own may look at no bias
                continue
            rate = local.learning_rate if leaf.name == OUTPUT_BIAS else local.row_learning_rate
            if len(idle):
                leaf.rows.grad.view(len(counts), -1)[idle] = 0
            self._rows.descend(leaf.name, leaf.places, leaf.rows.grad, rate)
        return losses.detach()

    def _sampled(self, states: Tensor, weights: Tensor, target: Tensor, negative: Tensor) -> tuple[Tensor, list[_Leaf]]:
        """Return the losses (G,) and the rows that they were computed from."""
        rows = self._rows
        leaves, sides = [], []
        for ids in (target, negative):
            vectors = _Leaf(self._output_name, ids, embedding(ids, rows.output).requires_grad_(rows.train))
            offset = -rows.log_expected[ids]
            leaves.append(vectors)
            if rows.bias is not None:
                bias = _Leaf(OUTPUT_BIAS, ids, rows.bias[ids].requires_grad_(rows.train))
                leaves.append(bias)
                offset = offset + bias.rows
            sides.append((vectors.rows, offset))
        return self._loss.group_losses(states, weights, sides[0], sides[1], (target, negative)), leaves

    def _result(self, g: int, fixed: Vector) -> GroupResult:
        losses = self._losses[g]
        mean = float(np.mean(losses)) if losses else 0.0
        return GroupResult(
            [Part(0, fixed), *self._rows.parts(self._places[g], self._round.spec)], mean, self._counts[g]
        )


@dataclass(frozen=True)
class _StepPlaces:
    """Where a device's words of one step stand: inputs and targets (B, T), negatives (K,)."""

    inputs: RowIds
    targets: RowIds
    negatives: RowIds


@dataclass(frozen=True)
class _Leaf:
    """Rows (..., D) or biases (...) that a step looked up in a table, and where."""

    name: str
    places: Tensor
    rows: Tensor


def _occurrences(work: DeviceWork) -> RowIds:
    """Return every word id of a device's steps, (n,): inputs, targets and negatives of each in turn."""
    ids: list[RowIds] = []
    for step, batch in enumerate(work.batches):
        ids += [batch.inputs.ravel(), batch.targets.ravel(), *work.negatives[step : step + 1]]
    return np.concatenate(ids) if ids else np.empty(0, np.int64)


def _stacked(arrays: Sequence[npt.NDArray[Any]], shape: tuple[int, ...], fill: int | bool) -> Tensor:
    """Return arrays, each no larger than `shape`, as one tensor (G, *shape)."""
    out = np.full((len(arrays), *shape), fill, arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[tuple(slice(n) for n in array.shape)] = array
    return torch.from_numpy(out)


def _real(counted: Sequence[npt.NDArray[np.bool_]], shape: tuple[int, int]) -> Tensor:
    """Return the flat places of the targets that count, device by device, (G, N); padded with the device's first."""
    S, T = shape
    places = []
    for g, which in enumerate(counted):
        s, t = np.nonzero(which)
        places.append(g * S * T + s * T + t)
    N = max(map(len, places))
    out = np.repeat(np.arange(len(places)) * S * T, N).reshape(-1, N)
    for row, place in zip(out, places, strict=True):
        row[: len(place)] = place
    return torch.from_numpy(out)
