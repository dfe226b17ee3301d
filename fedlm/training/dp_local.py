"""One device's local training as DP-SGD on its own sequences (`local.example_dp`; docs/example_dp.md).

The device makes the budget's steps: each of its sequences flips a coin, gradients are clipped one by one, noise goes on
*every* coordinate of the update, also on rows of the round's set that its text does not touch, for which words a device
has is part of what is protected. The sums are divided by `local.batch_size`, a public number.

The update that leaves is a function of noised releases alone; loss and number of tokens stay here.

Legend: S rows of the round's set, L rows in play, K negatives, B sequences, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedlm.config.schema import Config
from fedlm.data.batching import Batch, sequences
from fedlm.example_dp.clip_rule import ClipRule
from fedlm.example_dp.device_budget import DeviceBudget
from fedlm.example_dp.engine import PerExampleEngine
from fedlm.example_dp.per_example_gradients import PerExampleGradients
from fedlm.example_dp.plan import ExamplePlan, Phase
from fedlm.example_dp.tables.phantom import TrainedTables
from fedlm.example_dp.task import Task
from fedlm.models.table_names import INPUT_TABLE, OUTPUT_BIAS, OUTPUT_TABLE
from fedlm.registry import LOSSES
from fedlm.trainable.build import Trainable
from fedlm.trainable.spec import RowIds, UpdateSpec, Vector
from fedlm.training.device_batches import RoundWork
from fedlm.training.local import LocalResult


class PrivateLocalTrainer:
    """Trains devices one at a time with DP-SGD; it stands where `fedlm.training.local.LocalTrainer` does.

    Arguments:
        trainable: The model and what trains in it; its tables must be bound to the current blocks.
        config: The experiment.
        frequencies: Public word frequencies (V,).
        budget: Of every device.

    Guarantee:
        `DeviceBudget`'s, for the update of each call.
    """

    def __init__(
        self,
        trainable: Trainable,
        config: Config,
        frequencies: npt.NDArray[np.float64],
        budget: DeviceBudget,
    ) -> None:
        self._trainable, self._config, self._frequencies, self._budget = trainable, config, frequencies, budget
        self._rule = ClipRule(config.local.example_dp.clipping, budget.clip_norm)

    def start_round(self, spec: UpdateSpec, blocks: Mapping[str, Vector]) -> None:
        """Prepare for the devices of one round; the arguments are those of `LocalTrainer.start_round`."""
        self._round = RoundWork(self._trainable.model, self._config, self._frequencies, spec, blocks)

    def train(self, tokens: npt.NDArray[np.int32], *, key: bytes, device: int) -> LocalResult:
        """Train one device.

        Arguments:
            tokens: The device's token stream (n,).
            key: The round's key.
            device: The device's number; with the key it decides the negatives, and nothing else.

        Returns:
            The update; its loss and number of tokens are not told.
        """
        text = sequences(tokens, self._config.data.sequence_length)
        plan = self._plan(len(text.inputs), key, device)
        self._trainable.load(self._round.blocks)
        self._trainable.model.train()
        negatives = self._round.negatives(key, device, self._budget.steps)
        task = _DeviceTask(self._trainable, self._config, self._round, text, negatives)
        engine = PerExampleEngine(task)
        for step in range(self._budget.steps):
            task.begin_step(step, plan.step_secret(step))
            chosen = plan.sample(step) if len(text.inputs) else np.empty(0, np.int64)
            task.descend(self._means(engine, task, plan, text, chosen, step))
        return LocalResult(task.update(self._round), 0.0, 0)

    def _plan(self, num_sequences: int, key: bytes, device: int) -> ExamplePlan:
        """Return the sampler, clip rule and noise of one device in one round."""
        budget, count = self._budget, max(1, num_sequences)
        digest = blake2b(f"example noise/{device}".encode(), key=key, digest_size=7).digest()
        return ExamplePlan(
            num_examples=count,
            batch_size=budget.sampling_rate * count,
            phases=(Phase(budget.steps, budget.noise_multiplier),),
            delta=budget.delta,
            rule=self._rule,
            divisor=self._config.local.batch_size,
            seed=int.from_bytes(digest, "little"),
            reproducible=self._config.privacy.reproducible_noise,
        )

    def _means(
        self,
        engine: PerExampleEngine[Batch],
        task: _DeviceTask,
        plan: ExamplePlan,
        text: Batch,
        chosen: RowIds,
        step: int,
    ) -> dict[str, Tensor]:
        """Return a step's release."""
        sums = {name: torch.zeros_like(moving) for name, moving in task.moving.items()}
        size = self._config.local.batch_size
        for start in range(0, len(chosen), size):
            part = engine.clipped(text.select(chosen[start : start + size]), self._rule)
            for name, total in sums.items():
                total += part.sums[name][: len(total)]
        return plan.release(sums, step)


class _DeviceTask(Task[Batch]):
    """One device's model over a compact table: the round's rows first, all of them, then whatever else is in play."""

    def __init__(
        self, trainable: Trainable, config: Config, work: RoundWork, text: Batch, negatives: list[RowIds]
    ) -> None:
        self.model = trainable.model
        self._language_model, self._config, self._negatives = trainable.model, config, negatives
        self._parameters = {name: trainable.parameters[name] for name in work.parameters}
        moving = np.flatnonzero(work.slot >= 0)  # (S,) sorted, as the round's rows are
        used = np.unique(np.concatenate([text.inputs.ravel(), text.targets.ravel(), *negatives]))
        if not LOSSES.resolve(config.loss.kind).draws_negatives:
            used = np.arange(trainable.model.vocabulary_size)
        ids = np.concatenate([moving, used[work.slot[used] < 0]])  # (L,)
        self._num_moving = len(moving)
        self._index = torch.zeros(trainable.model.vocabulary_size, dtype=torch.int64)  # (V,)
        self._index[torch.from_numpy(ids)] = torch.arange(len(ids))
        self._log_expected = work.log_expected[torch.from_numpy(ids)]  # (L,)
        self._sources = _tables(trainable)
        self._head_ids = torch.from_numpy(moving)
        compact = {name: table[torch.from_numpy(ids)] for name, table in self._sources.items()}
        self._compact = compact
        self._tables = TrainedTables(
            input_table=compact[INPUT_TABLE],
            output_table=compact.get(OUTPUT_TABLE),
            output_bias=compact.get(OUTPUT_BIAS),
            trained=frozenset(compact if self._num_moving else ()),
            num_moving=self._num_moving,
        )
        moved = compact if self._num_moving else {}
        self.trained = {**self._parameters, **moved}
        self.moving = {**self._parameters, **{name: table[: self._num_moving] for name, table in moved.items()}}
        """What a release is added to, by name: parameters, and the moving rows of the tables."""

    def num_examples(self, batch: Batch) -> int:
        """Return B."""
        return len(batch.inputs)

    def begin_step(self, step: int, secret: bytes) -> None:
        """Take the step's negatives; dropout follows from the step's secret."""
        self._step = step
        self._language_model.seed_dropout(int.from_bytes(secret[:7], "little"))

    def losses(self, batch: Batch, per_example: PerExampleGradients) -> Tensor:
        """Return each sequence's mean loss over its own targets, (B,)."""
        model, tables = self._language_model, self._tables
        inputs, targets = (torch.from_numpy(words) for words in (batch.inputs, batch.targets))  # (B, T)
        mask = torch.from_numpy(batch.mask)  # (B, T)
        rows = tables.look_up(per_example, self._index[inputs], mask)  # (B, T, D)
        hidden = model.body(model.embed(rows), mask, model.row_noise(inputs))  # (B, T, D)
        local = self._index[targets]  # (B, T)
        if not LOSSES.resolve(self._config.loss.kind).draws_negatives:
            return tables.full_softmax(per_example, hidden, local, mask, self._config.loss.chunk)
        negatives = self._index[torch.from_numpy(self._negatives[self._step])]  # (K,)
        return tables.sampled(per_example, hidden, local, mask, negatives, self._log_expected, self._config.loss.kind)

    @torch.no_grad()
    def descend(self, means: Mapping[str, Tensor]) -> None:
        """Move what trains along a release."""
        local = self._config.local
        for name, tensor in self.moving.items():
            rate = local.row_learning_rate if name in (INPUT_TABLE, OUTPUT_TABLE) else local.learning_rate
            tensor.sub_(means[name], alpha=rate)

    @torch.no_grad()
    def update(self, work: RoundWork) -> Vector:
        """Return the new minus the old values, (P,)."""
        update = np.zeros(work.spec.size, np.float32)
        views = work.spec.views(update)
        for name, parameter in self._parameters.items():
            np.subtract(parameter.numpy(), work.blocks[name], out=views[name])
        for name in self.moving.keys() - self._parameters.keys():
            views[name][...] = (self.moving[name] - self._sources[name][self._head_ids]).numpy()
        return update


def _tables(trainable: Trainable) -> dict[str, Tensor]:
    """Return the model's tables by name."""
    model = trainable.model
    named = {
        INPUT_TABLE: model.input_table,
        OUTPUT_TABLE: None if model.tied else model.output_table,
        OUTPUT_BIAS: model.output_bias,
    }
    return {name: table for name, table in named.items() if table is not None}
