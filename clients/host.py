"""A node's devices: the current model, their data, and the training of whichever devices the server asks for.

In simulation a node is a worker that can train every device of the fleet; a device is a row of data, not an object.
"""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clients.canary_devices import CanaryDevices
from clients.node_sum import NodeSum
from fedlm.config.schema import Config
from fedlm.data.batching import sequences
from fedlm.errors import DataError, WorkerError
from fedlm.example_dp.device_budget import device_budget
from fedlm.experiment import Experiment, Weights, starts_from_base
from fedlm.losses.evaluation import Score, score
from fedlm.losses.metrics import ScoredTokens, contributions, metrics_of
from fedlm.messages import (
    FROM_SCRATCH,
    NOT_FINITE,
    Broadcast,
    EvaluateReply,
    EvaluateRequest,
    TrainReply,
    TrainRequest,
)
from fedlm.models.transformer import TransformerModel
from fedlm.privacy.clipping.clipped_sum import ClippedSum, ClipRecord
from fedlm.privacy.clipping.query_input import NO_WORDS, DeviceStats
from fedlm.trainable.parts import Part, restricted
from fedlm.training import matmul_backend
from fedlm.training.dp_local import PrivateLocalTrainer
from fedlm.training.grouped.trainer import GroupTrainer, why_not_grouped
from fedlm.training.local import LocalTrainer
from fedlm.training.user_level_noise import released_noise

UNKNOWN_VERSION = -2
EVALUATION_TOKENS = 4096  # tokens whose hidden states are scored at once
Words: TypeAlias = npt.NDArray[np.int32]  # (n,) a text's word ids
log = logging.getLogger(__name__)


class DeviceHost:
    """Hosts the devices of one experiment in this process.

    Arguments:
        config: The experiment.
        weights: The base's weights, when they are already in shared memory; else they are read from its folder.
    """

    def __init__(self, config: Config, weights: Weights | None = None) -> None:
        self._config = config
        self._experiment = Experiment.open(config)
        self._fleet, self._canaries = self._experiment.fleet, CanaryDevices(self._experiment)
        self._trainable = self._experiment.trainable(weights)
        # Only a base that this process has mapped for itself is its own to write to, and then page by page.
        is_own = weights is None and starts_from_base(config)
        self._blocks = self._trainable.initial_blocks(copy_tables=not is_own)
        self._trainable.bind_tables(self._blocks)
        matmul_backend.use(config.execution.products)
        frequencies = self._experiment.vocabulary.frequencies
        budget = device_budget(config)
        self._trainer = (
            LocalTrainer(self._trainable, config, frequencies)
            if budget is None
            else PrivateLocalTrainer(self._trainable, config, frequencies, budget)
        )
        is_grouped = not why_not_grouped(self._trainable, config)
        self._groups = GroupTrainer(self._trainable, config, frequencies) if is_grouped else None
        self._metrics = metrics_of(config.evaluation)
        self._run, self._version, self._opened = "", 0, b""

    def train(self, broadcast: Broadcast, request: TrainRequest, kept: NodeSum) -> TrainReply:
        """Train the requested devices and add their clipped updates to the node's sum."""
        with one_thread():
            return self._train(broadcast, request, kept)

    def evaluate(self, broadcast: Broadcast, request: EvaluateRequest) -> EvaluateReply:
        """Score held-out users with the exact full softmax."""
        with one_thread():
            return self._evaluate(broadcast, request)

    def _train(self, broadcast: Broadcast, request: TrainRequest, kept: NodeSum) -> TrainReply:
        outcome = _TrainedDevices()
        if not self._apply(broadcast):
            return outcome.reply(stale=True)
        if broadcast.key != self._opened:  # once a round and version, however many work items of it come here
            full, self._opened = self._trainable.spec, broadcast.key
            self._moves = full.with_rows(broadcast.row_ids, broadcast.moves or None)
            self._spec = full.with_rows(broadcast.row_ids, broadcast.sends) if broadcast.sends else self._moves
            self._trainer.start_round(self._moves, self._blocks)
            if self._groups:
                self._groups.start_round(self._moves, self._blocks)
        with kept.work_item(request, self._spec.size) as total:
            for group in np.split(request.devices, np.cumsum(request.group_sizes)[:-1]):
                self._train_group(total, broadcast.key, group.tolist(), outcome)
        return outcome.reply(stale=False, tells_all=self._config.privacy.non_private_diagnostics)

    def _train_group(self, total: ClippedSum, key: bytes, devices: list[int], outcome: _TrainedDevices) -> None:
        """Train the devices of one group and add each clipped update to the sum."""
        texts = self._texts(self._canaries.contribute(total, self._spec, devices), outcome)
        ready, size = list(texts), self._groups.largest_group if self._groups else 1
        for start in range(0, len(ready), size):
            part = {device: texts[device] for device in ready[start : start + size]}
            if self._groups is None:
                self._train_alone(total, key, part, outcome)
            else:
                self._train_together(self._groups, total, key, part, outcome)

    def _texts(self, devices: list[int], outcome: _TrainedDevices) -> dict[int, Words]:
        """Return the devices' token streams; a device whose text cannot be read fails here, by itself."""
        texts: dict[int, Words] = {}
        for device in devices:
            try:
                texts[device] = self._checked(self._tokens(device))
            except Exception as error:  # one device's failure must not cost the others their round
                outcome.fail(device, error)
        return texts

    def _checked(self, tokens: Words) -> Words:
        """Return a text all of whose words are in the vocabulary."""
        size = self._trainable.model.vocabulary_size
        wrong = tokens[(tokens < 0) | (tokens >= size)]
        if len(wrong):
            raise IndexError(f"word {wrong[0]} of its text is not in the vocabulary of {size:,} words")
        return tokens

    def _train_together(
        self, trainer: GroupTrainer, total: ClippedSum, key: bytes, texts: dict[int, Words], outcome: _TrainedDevices
    ) -> None:
        """Train devices in one program and add their updates.

        There is no other way to train them: devices that train one by one have other last bits, so a silent second way
        would make a run's bits depend on what failed. Whatever fails here fails the whole work item, the server
        notes the reason in the ledger and has the work item done again, and a work item that keeps failing ends the
        run.

        Guarantee:
            A round must never be repeated or end because of what a device's data are (it would tell about them, and
            not only within the clip). Nothing in a text can raise here: its words are in the vocabulary (`_texts`), any
            length from zero on trains, memory is bounded by the config (batches, sequence length, tokens a user), and
            numbers that are not finite raise nowhere: they become an update that is not finite, whose contribution is
            zero. What is left are errors of program and machine, which are the same whoever is in the group.

        Raises:
            WorkerError: The program failed. Updates may have been added: the node's sum must be dropped.
        """
        devices = list(texts)
        try:
            results = trainer.train(list(texts.values()), key=key, devices=devices)
        except Exception as error:
            tells_all = self._config.privacy.non_private_diagnostics
            cause = one_line(error) if tells_all else type(error).__name__
            raise WorkerError(f"a group of {len(devices)} devices failed: {cause}") from error
        for device, result in zip(devices, results, strict=True):
            add = partial(total.add_parts, self._sent(result.parts))
            self._add(add, device, self._device_stats(total, texts[device], result.loss, result.num_tokens), outcome)

    def _train_alone(self, total: ClippedSum, key: bytes, texts: dict[int, Words], outcome: _TrainedDevices) -> None:
        """Train devices one by one; one that fails contributes zero, and nothing of it reaches another."""
        for device, text in texts.items():
            try:
                result = self._trainer.train(text, key=key, device=device)
            except Exception as error:  # one device's failure must not cost the others their round
                outcome.fail(device, error)
                continue
            sends_all = self._spec is self._moves
            parts = [] if sends_all else self._sent([Part(0, result.update)])
            add = partial(total.add, result.update) if sends_all else partial(total.add_parts, parts)
            self._add(add, device, self._device_stats(total, text, result.loss, result.num_tokens), outcome)

    @staticmethod
    def _add(
        add: Callable[[DeviceStats], ClipRecord], device: int, device_stats: DeviceStats, outcome: _TrainedDevices
    ) -> None:
        """Add a device to the sum; one whose text a side query fails on contributes zero, by itself."""
        try:
            record = add(device_stats)
        except DataError as error:
            outcome.fail(device, error)
        else:
            outcome.add(device, record, device_stats.loss)

    def _sent(self, parts: list[Part]) -> list[Part]:
        """Return what a device sends of its update."""
        return parts if self._spec is self._moves else restricted(parts, self._moves, self._spec)

    def _device_stats(self, total: ClippedSum, text: Words, loss: float, num_tokens: int) -> DeviceStats:
        """Return what the round's side queries may ask; the words only where one does."""
        asks_words = any(side_query.wants_words for side_query in total.clip_spec.side_queries)
        return DeviceStats(loss, num_tokens, text.astype(np.int64) if asks_words else NO_WORDS)

    def _tokens(self, device: int) -> Words:
        phrase = self._canaries.tokens(device)
        return self._experiment.store.tokens(int(self._fleet[device])) if phrase is None else phrase

    def _evaluate(self, broadcast: Broadcast, request: EvaluateRequest) -> EvaluateReply:
        if not self._apply(broadcast):
            return EvaluateReply(True, 0.0, 0, 0, 0.0, 0.0, [])
        self._trainable.load(self._blocks)
        self._trainable.model.eval()
        total = sum((self._score_user(user) for user in request.users.tolist()), Score())
        sums = total.nll, total.num_tokens, total.num_bytes, total.log_z, total.log_z_squared
        return EvaluateReply(False, *sums, list(total.metrics))

    def _apply(self, broadcast: Broadcast) -> bool:
        """Bring the values up to date; False if the patch does not fit."""
        if broadcast.run != self._run:
            # A fresh host holds the base, version 0 of any run; one that served another run holds nothing useful.
            self._version = 0 if not self._run else UNKNOWN_VERSION
            self._run = broadcast.run
        if self._version == broadcast.to_version:
            return True
        if broadcast.from_version == FROM_SCRATCH:
            self._trainable.spec.scatter_blocks(self._blocks, broadcast.patch)
        elif broadcast.from_version == self._version:
            changed = self._trainable.spec.with_rows(broadcast.patch_rows, broadcast.patch_blocks or None)
            changed.scatter_blocks(self._blocks, broadcast.patch)
        else:
            return False
        self._version, self._opened = broadcast.to_version, b""  # a round is opened on the values that it starts from
        self._note_noise(broadcast)
        return True

    def _note_noise(self, broadcast: Broadcast) -> None:
        """Tell a model with Re-Attention how noisy its weights now are."""
        model, config = self._trainable.model, self._config
        if isinstance(model, TransformerModel) and model.re_attention and broadcast.to_version:
            model.noise_levels = released_noise(
                config,
                self._trainable,
                self._experiment.vocabulary.frequencies,
                noise_std=broadcast.noise_std,
                rounds=broadcast.to_version,
            )

    def _further(self, targets: Tensor, hidden: Tensor, nll: Tensor) -> tuple[float, ...]:
        """Return what tokens (N,) add to the further metrics of the evaluation."""
        model, frequencies = self._trainable.model, self._experiment.vocabulary.frequencies
        tables = model.output_table, model.output_bias
        scored = ScoredTokens(targets, nll, hidden, *tables, frequencies, self._config.loss.chunk)
        return contributions(self._metrics, scored)

    @torch.no_grad()
    def _score_user(self, user: int) -> Score:
        model, store = self._trainable.model, self._experiment.store
        batch = sequences(store.tokens(user), self._config.data.sequence_length)
        per_pass = max(1, EVALUATION_TOKENS // batch.inputs.shape[1])
        total = Score(num_bytes=int(store.num_bytes[user]))
        for start in range(0, len(batch.inputs), per_pass):
            part = slice(start, start + per_pass)
            mask = torch.from_numpy(batch.mask[part])  # (B, T)
            hidden = model.hidden(torch.from_numpy(batch.inputs[part]), mask)[mask]  # (N, D)
            targets = torch.from_numpy(batch.targets[part])[mask]  # (N,)
            table, bias, chunk = model.output_table, model.output_bias, self._config.loss.chunk
            further = partial(self._further, targets, hidden)
            total += score(hidden, targets, table, bias, num_bytes=0, chunk=chunk, further=further)
        return total


@dataclass
class _TrainedDevices:
    """What became of a work item's devices.

    Arguments:
        trained: (device, norm before the clip, training loss) of each.
        failed: Why, by device.
    """

    trained: list[tuple[int, float, float]] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)

    def add(self, device: int, record: ClipRecord, loss: float) -> None:
        """Note a device whose training ended; an update that was not finite has contributed zero."""
        if record.finite:
            self.trained.append((device, record.norm, loss))
        else:
            self.failed[device] = NOT_FINITE

    def fail(self, device: int, error: Exception) -> None:
        """Note a device that has failed and contributes zero."""
        log.debug("device %d failed", device, exc_info=error)
        self.failed[device] = one_line(error)

    def reply(self, *, stale: bool, tells_all: bool = False) -> TrainReply:
        """Return what the server is told; without noise, and so only if `tells_all`, norms, losses and causes."""
        devices, norms, losses = zip(*self.trained, strict=True) if self.trained else ((), (), ())
        return TrainReply(
            stale=stale,
            devices=np.array(devices, np.int64),
            non_private_norms=np.array(norms if tells_all else (), np.float64),
            non_private_losses=np.array(losses if tells_all else (), np.float64),
            failed=np.array(list(self.failed), np.int64),
            causes=list(self.failed.values()) if tells_all else ["not told"] * len(self.failed),
            peak_mb=_peak_mb(),
        )


def one_line(error: Exception) -> str:
    """Return an exception's type and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: products split over threads round otherwise, and a device's update must have the same
    bits wherever it is trained. Cores are used by more workers.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _peak_mb() -> float:
    """Peak resident memory of this process, MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
