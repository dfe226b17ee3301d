"""Neighbouring fleets: whatever one device's text does in training, no other device's contribution moves by a bit.

The clip bounds what a device adds to a sum. It bounds nothing if the device also changes what others add: devices that
train together in one program then move the sum by (group size) C. So fleets are trained by the real trainer in which
one device's text is poisoned or tame, with equal shapes, and in which the device is absent.

A word is poisoned by its row of the public input table, which overflows what reads it; the tame text has another word
in its place. Neither is anybody else's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedlm.config.schema import Config
from fedlm.errors import ConfigError
from fedlm.models.base import LanguageModel
from fedlm.models.factory import build_model
from fedlm.randomness import round_key, stream
from fedlm.testkit.failure import PrivacyTestFailure
from fedlm.trainable.build import Trainable, build_trainable
from fedlm.trainable.parts import Part, dense
from fedlm.trainable.spec import RowIds, UpdateSpec, Vector
from fedlm.training.grouped.trainer import GroupTrainer, why_not_grouped

ROUNDING = 1e-5
"""Of the values that an update is a difference of: how far other shapes of the same products round."""
POISON = {"infinity": math.inf, "NaN": math.nan, "the largest floats": 3e38, "1e20": 1e20}
_KEY = round_key(0, 1)
_LENGTHS = (75, 9, 40, 12, 3, 76)  # tokens; the first makes others pad, the second pads
_HOSTILE = {"a long text": 0, "a short text": 1}
_NUM_WORDS, _NUM_ROWS, _FIRST = 60, 20, 3

Tokens = npt.NDArray[np.int32]


class Trained(Protocol):
    """What a trainer gives for a device; see `fedlm.training.grouped.trainer.GroupResult`."""

    @property
    def parts(self) -> list[Part]:
        """The update, before clipping."""
        ...


class FleetTrainer(Protocol):
    """Trains devices together; see `fedlm.training.grouped.trainer.GroupTrainer`."""

    largest_group: int

    def start_round(self, spec: UpdateSpec, blocks: Mapping[str, Vector]) -> None:
        """Prepare for the devices of one round."""
        ...

    def train(self, tokens: Sequence[Tokens], *, key: bytes, devices: Sequence[int]) -> Sequence[Trained]:
        """Train a group."""
        ...


MakeTrainer = Callable[[Trainable, Config, npt.NDArray[np.float64]], FleetTrainer]


def check_neighbouring_fleets(
    config: Config, *, model: LanguageModel | None = None, trainer: MakeTrainer = GroupTrainer
) -> None:
    """Train neighbouring fleets in groups and compare every other device's update; some seconds.

    Arguments:
        config: Model, loss and what trains; sizes, rates and text are the kit's. With the full softmax the kit unties
            the tables: a poisoned row would be in everybody's scores.
        model: A model of one's own, untied under the full softmax; None: that of `config`, made tiny.
        trainer: What makes a trainer of a model, a config and word frequencies (V,).

    Raises:
        PrivacyTestFailure: A device's update changed by a bit when another's text was poisoned, moved by more than
            `ROUNDING` when the other was absent, or is zero or not finite though its own text is tame.
        ConfigError: Groups cannot train this experiment, or the model has fewer than 60 words.

    Guarantee:
        No false alarms where arithmetic rounds alike for equal shapes, and on one thread it does. Found is what four
        poisons (infinity, NaN, the largest floats, 1e20) in a long and in a short text leave to others of a group, in
        rows that train and that do not, and to groups that the same trainer trains later.
    """
    bench = _Bench.build(config, model, trainer)
    for name, device in _HOSTILE.items():
        for rows in bench.row_sets:
            _absent(bench, rows, device, name)
            for poison in POISON:
                _poisoned(bench, rows, device, f"{name} of {poison}", POISON[poison])


def _poisoned(bench: _Bench, rows: RowIds, device: int, name: str, value: float) -> None:
    tame = bench.updates(rows, _fleet(device, bench.tame), value)
    found = bench.updates(rows, _fleet(device, bench.poisoned), value)
    for d in tame.keys() - {device}:
        if not (np.isfinite(tame[d]).all() and tame[d].any()):
            raise PrivacyTestFailure(
                f"neighbouring fleets: device {d} of {len(tame)}, all tame, has an update that is zero or not finite"
            )
        if tame[d].tobytes() != found[d].tobytes():
            changed = int(np.sum(tame[d] != found[d]))
            raise PrivacyTestFailure(
                f"neighbouring fleets: {name} in device {device} changes {changed:,} of {tame[d].size:,} coordinates "
                f"of device {d}; one device then moves the sum by more than C"
            )


def _absent(bench: _Bench, rows: RowIds, device: int, name: str) -> None:
    fleet = _fleet(device, bench.tame)
    there = bench.updates(rows, fleet, 0.1)
    absent = bench.updates(rows, {d: text for d, text in fleet.items() if d != device}, 0.1)
    for d, update in absent.items():
        scale = bench.magnitudes(rows) + np.abs(update).max(initial=0)  # (P,)
        moved = float(np.max(np.abs(there[d] - update) / scale))
        if not moved <= ROUNDING:
            raise PrivacyTestFailure(
                f"neighbouring fleets: without device {device} ({name}) device {d} moves by {moved:.3g} of its values, "
                f"allowed is the rounding, {ROUNDING:g}"
            )


def _fleet(hostile: int, word: int) -> dict[int, Tokens]:
    """Return the devices' texts; every second token of the hostile one is `word`."""
    texts = {
        d: stream(_KEY, "text", d).integers(_FIRST, _NUM_WORDS - 2, length).astype(np.int32)
        for d, length in enumerate(_LENGTHS)
    }
    texts[hostile][::2] = word
    return texts


@dataclass(frozen=True)
class _Bench:
    """An experiment in the kit's sizes.

    Arguments:
        config: With sizes, rates and options of the kit.
        model: Never trained itself: each fleet trains a copy.
        make: Of trainers.
    """

    config: Config
    model: LanguageModel
    make: MakeTrainer

    @classmethod
    def build(cls, config: Config, model: LanguageModel | None, make: MakeTrainer) -> _Bench:
        """Shrink the experiment, and refuse what this check cannot examine."""
        small = _small(config)
        found = build_model(small, _frequencies(_NUM_WORDS), 0) if model is None else model
        if found.vocabulary_size < _NUM_WORDS:
            raise ConfigError(f"model has {found.vocabulary_size} words, the kit's texts need at least {_NUM_WORDS}")
        if found.tied and small.loss.kind == "full_softmax":
            raise ConfigError("a tied model under the full softmax scores the kit's poison for everybody; untie it")
        bench = cls(small, found, make)
        if reason := why_not_grouped(bench.trainable(), small):
            raise ConfigError(f"{reason}; such devices train one by one, and there is no group to check")
        return bench

    @property
    def poisoned(self) -> int:
        """The word whose input row is poisoned."""
        return self.model.vocabulary_size - 1

    @property
    def tame(self) -> int:
        """The word in its place."""
        return self.model.vocabulary_size - 2

    @property
    def row_sets(self) -> list[RowIds]:
        """The round's rows: without the two words and, where that leaves others alone, with them."""
        if not self.config.trainable.embedding_rows.count:
            return [np.empty(0, np.int64)]
        frozen = np.arange(_FIRST, _FIRST + _NUM_ROWS)
        moving = np.append(frozen[:-2], [self.tame, self.poisoned])
        return [frozen] if self.config.loss.kind == "full_softmax" else [frozen, moving]

    def trainable(self) -> Trainable:
        """Return a copy of the model with what trains in it; LoRA's B is not zero, so that A has gradients too."""
        made = build_trainable(copy.deepcopy(self.model), self.config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in made.parameters.items():
                if ".lora_B." in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return made

    def updates(self, rows: RowIds, fleet: Mapping[int, Tokens], value: float) -> dict[int, Vector]:
        """Train a fleet in one round, with an input row of `value`; return the updates (P,)."""
        trainable = self.trainable()
        blocks = trainable.initial_blocks(copy_tables=True)
        table = trainable.model.input_table.clone()
        table[self.poisoned] = value * torch.linspace(-1, 1, table.shape[1])
        trainable.model.set_tables(input_table=table)
        spec = trainable.spec.with_rows(rows)
        trainer = self.make(trainable, self.config, _frequencies(self.model.vocabulary_size))
        trainer.start_round(spec, blocks)
        found: dict[int, Vector] = {}
        for group in _groups(list(fleet), trainer.largest_group):
            with np.errstate(all="ignore"):
                results = trainer.train([fleet[d] for d in group], key=_KEY, devices=group)
            found |= {d: dense(list(result.parts), spec.size) for d, result in zip(group, results, strict=True)}
        return found

    def magnitudes(self, rows: RowIds) -> Vector:
        """Return the sizes of the values (P,) that a round's update changes."""
        trainable = self.trainable()
        spec, blocks = trainable.spec.with_rows(rows), trainable.initial_blocks(copy_tables=True)
        views = [np.ravel(blocks[b.name][rows] if b.kind == "rows" else blocks[b.name]) for b in spec.blocks]
        return np.abs(np.concatenate(views))


def _groups(devices: list[int], size: int) -> Iterator[list[int]]:
    return (devices[start : start + size] for start in range(0, len(devices), size))


def _frequencies(num_words: int) -> npt.NDArray[np.float64]:
    """Return word frequencies (V,); nobody draws the last two words as negatives."""
    weights = 1 / np.arange(3.0, num_words + 3)
    weights[-2:] = 1e-12
    return np.asarray(weights / weights.sum())


def _small(config: Config) -> Config:
    """Return the experiment in the kit's sizes."""
    model: dict[str, Any] = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_hidden": 24, "d_ff": 0}
    if config.loss.kind == "full_softmax":
        model["tied"] = False
    rows = config.trainable.embedding_rows
    loss = replace(config.loss, negatives=_NUM_ROWS, negatives_from="vocabulary", chunk=17)
    return replace(
        config,
        vocabulary=replace(config.vocabulary, size=_NUM_WORDS),
        model=replace(config.model, **model),
        data=replace(config.data, sequence_length=12),
        local=replace(config.local, batch_size=3, epochs=2, learning_rate=0.1, row_learning_rate=0.02),
        loss=loss,
        trainable=replace(config.trainable, embedding_rows=replace(rows, count=min(rows.count, _NUM_ROWS))),
        execution=replace(config.execution, group_size=len(_LENGTHS)),
    )
