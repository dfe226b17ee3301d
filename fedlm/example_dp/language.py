"""Next-token prediction with example-level DP: any `LanguageModel`, its tables and all training losses.

One example is one sequence; its loss is the mean over its own targets.

Legend: V vocabulary, B sequences, T tokens, K negatives.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedlm.config.schema import Config
from fedlm.data.batching import Batch
from fedlm.errors import ConfigError
from fedlm.example_dp.per_example_gradients import PerExampleGradients
from fedlm.example_dp.tables.phantom import TrainedTables
from fedlm.example_dp.task import Examples, Task
from fedlm.losses.negatives import NoiseDistribution
from fedlm.models.base import LanguageModel
from fedlm.models.table_names import INPUT_TABLE, OUTPUT_BIAS, OUTPUT_TABLE
from fedlm.randomness import stream
from fedlm.registry import LOSSES
from fedlm.trainable.build import Trainable


class LanguageTask(Task[Batch]):
    """A language model's task under the configured loss.

    Guarantee: an example's gradient is a function of the example, the model, and draws that do not depend on the data.
    Negatives are numbered by the logical step alone, and are the same for all its physical batches: their number
    depends on who was sampled. Dropout masks come from the step's secret key, one after another, so each example's mask
    is an independent draw wherever in a batch it stands.

    Arguments:
        trainable: The model and the trained parameters of its body.
        config: The experiment; its `loss` is read.
        frequencies: Public word frequencies (V,), all positive.
        tables: Which of "input_table", "output_table" and "output_bias" train wholly; the model gets writable copies of
            those, which a step writes into. A tied table is the "input_table".
        negatives_key: Of the negatives' stream; may be public, must not depend on the data.

    Raises:
        ConfigError: A table that the model does not have, or `loss.negatives_from = "rows"`.
    """

    model: LanguageModel

    def __init__(
        self,
        trainable: Trainable,
        config: Config,
        frequencies: npt.NDArray[np.float64],
        *,
        tables: frozenset[str] = frozenset(),
        negatives_key: bytes,
    ) -> None:
        self.model = trainable.model
        self._loss, self._key, self._step = config.loss, negatives_key, 0
        owned = _own_tables(self.model, tables)
        self.trained: Mapping[str, Tensor] = {**trainable.parameters, **owned}
        self._noise: NoiseDistribution | None = None
        if LOSSES.resolve(config.loss.kind).draws_negatives:
            _refuse_rows(config)
            self._noise = NoiseDistribution(frequencies, config.loss, np.empty(0, np.int64))
            self._log_expected = torch.from_numpy(self._noise.log_expected)  # (V,)

    def begin_step(self, step: int, secret: bytes) -> None:
        """Number the negatives and seed dropout; see `Task.begin_step`."""
        self._step = step
        self.model.seed_dropout(int(stream(secret, "dropout").integers(2**63)))

    def num_examples(self, batch: Batch) -> int:
        """Return B."""
        return len(batch.inputs)

    def losses(self, batch: Batch, per_example: PerExampleGradients) -> Tensor:
        """Return each sequence's mean loss over its own targets, (B,); 0 for one without targets."""
        model, tables = self.model, self._tables()
        device = model.input_table.device
        inputs, targets, mask, read = (
            torch.from_numpy(array).to(device) for array in (batch.inputs, batch.targets, batch.mask, batch.read)
        )  # (B, T) each
        rows = tables.look_up(per_example, inputs, read)  # (B, T, D)
        hidden = model.body(model.embed(rows), read, model.row_noise(inputs))  # (B, T, D)
        if self._noise is None:
            return tables.full_softmax(per_example, hidden, targets, mask, self._loss.chunk)
        negatives = torch.from_numpy(self._noise.draw(stream(self._key, "negatives", self._step))).to(device)  # (K,)
        log_expected = self._log_expected.to(tables.output_table)  # (V,)
        return tables.sampled(per_example, hidden, targets, mask, negatives, log_expected, self._loss.kind)

    def _tables(self) -> TrainedTables:
        model = self.model
        return TrainedTables(
            input_table=model.input_table,
            output_table=None if model.tied else model.output_table,
            output_bias=model.output_bias,
            trained=frozenset(self.trained) & {INPUT_TABLE, OUTPUT_TABLE, OUTPUT_BIAS},
        )


class Sequences(Examples[Batch]):
    """The sequences of a batch as examples; `sequences` holds n of them."""

    def __init__(self, sequences: Batch) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return len(self._sequences.inputs)

    def lengths(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the tokens of some of them, (B,)."""
        return np.asarray(self._sequences.mask[indices].sum(axis=1))

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        """Return some of them as one batch, cut to the longest, but never to nothing."""
        batch = self._sequences.select(indices)
        if batch.inputs.shape[1]:
            return batch
        nothing = np.zeros((len(indices), 1), np.int64)  # (B, 1)
        return Batch(nothing, nothing, nothing.astype(np.bool_))


def _own_tables(model: LanguageModel, names: frozenset[str]) -> dict[str, Tensor]:
    """Give the model writable copies of these tables, and return them by name."""
    present = {INPUT_TABLE: model.input_table, OUTPUT_BIAS: model.output_bias}
    if not model.tied:
        present[OUTPUT_TABLE] = model.output_table
    owned = {name: table.clone() for name in sorted(names) if (table := present.get(name)) is not None}
    if missing := sorted(names - owned.keys()):
        known = ", ".join(name for name, table in present.items() if table is not None)
        raise ConfigError(f"table '{missing[0]}' cannot train: the model has only {known}; leave it out")
    model.set_tables(**owned)
    return owned


def _refuse_rows(config: Config) -> None:
    if config.loss.negatives_from == "rows":
        raise ConfigError(
            'loss.negatives_from = "rows" means a round\'s row set, which example-level training does not have; '
            'use "vocabulary"'
        )
