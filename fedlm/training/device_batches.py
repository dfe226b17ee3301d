"""What a device trains on in a round: its batches, its negatives and its dropout, all from its own keyed streams.

Both programs of local training, one device at a time (`local.py`) and many at once (`grouped/trainer.py`), start here,
so they see the same draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedlm.config.schema import Config
from fedlm.data.batching import Batch, local_batches
from fedlm.losses.negatives import NoiseDistribution
from fedlm.models.base import LanguageModel
from fedlm.randomness import stream
from fedlm.registry import LOSSES
from fedlm.trainable.spec import RowIds, UpdateSpec, Vector


@dataclass(frozen=True)
class DeviceWork:
    """The local training of one device.

    Arguments:
        batches: In order, one for each step.
        negatives: (K,) word ids for each step; empty with the full softmax.
        dropout_seed: Of the device's dropout masks.
    """

    batches: list[Batch]
    negatives: list[RowIds]
    dropout_seed: int


class RoundWork:
    """One round, as its devices see it.

    Arguments:
        model: The model that trains.
        config: The experiment.
        frequencies: Public word frequencies (V,).
        spec: What moves in the round.
        blocks: Current values of everything that may train: the blocks of the full spec, by name.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: Config,
        frequencies: npt.NDArray[np.float64],
        spec: UpdateSpec,
        blocks: Mapping[str, Vector],
    ) -> None:
        self._config = config
        self.spec, self.blocks = spec, blocks
        rows = spec.row_ids
        if rows is None:
            rows = np.arange(model.vocabulary_size if spec.row_blocks else 0)
        self._noise = NoiseDistribution(frequencies, config.loss, rows)
        self.log_expected = torch.from_numpy(self._noise.log_expected)  # (V,) log of the expected count, K q
        self._in_set = np.zeros(model.vocabulary_size, np.bool_)  # (V,)
        self._in_set[rows] = True
        moving = rows if spec.row_blocks else rows[:0]
        self.slot = np.full(model.vocabulary_size, -1, np.int64)  # (V,) place in the row set, or -1: does not move
        self.slot[moving] = np.arange(len(moving))
        self.parameters = [block.name for block in spec.blocks if block.kind != "rows"]
        """Names of the trained tensors of the body."""

    def of(self, tokens: npt.NDArray[np.int32], *, key: bytes, device: int) -> DeviceWork:
        """Return one device's work.

        Arguments:
            tokens: The device's token stream (n,).
            key: The round's key.
            device: The device's number; with the key it decides shuffling, negatives and dropout.
        """
        local = self._config.local
        batches = list(
            local_batches(
                tokens,
                length=self._config.data.sequence_length,
                batch_size=local.batch_size,
                epochs=local.epochs,
                generator=stream(key, "shuffle", device),
            )
        )
        negatives = self.negatives(key, device, len(batches))
        return DeviceWork(batches, negatives, int(stream(key, "dropout", device).integers(2**63)))

    def negatives(self, key: bytes, device: int, num_steps: int) -> list[RowIds]:
        """Return the negatives (K,) of each of a number of steps; none with the full softmax."""
        if not LOSSES.resolve(self._config.loss.kind).draws_negatives:
            return []
        draws = stream(key, "negatives", device)
        return [self._noise.draw(draws) for _ in range(num_steps)]

    def counted(self, batch: Batch) -> npt.NDArray[np.bool_]:
        """Return which targets of a batch count (B, T): the real ones, or those of the row set alone."""
        if self._config.loss.negatives_from == "rows":
            inside: npt.NDArray[np.bool_] = batch.mask & self._in_set[batch.targets]
            return inside
        return batch.mask
