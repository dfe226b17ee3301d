"""Central training of the public base, on the text of volunteers who publish it or on any other public text.

LoRA adapts a model that already speaks; this is the short warm-up that gives it one. Everything trains: the body with
AdamW, the tables with sparse Adam on the rows that a step touches, under NCE, so that no V x D gradient exists and the
scores come out normalised, as the devices' NCE takes for granted. There is no privacy here and none is needed: the text
is public.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from fedlm.config.schema import Config, DataConfig, LossConfig
from fedlm.data.batching import Batch, sequences
from fedlm.data.store import TokenStore, build_store
from fedlm.data.vocabulary import Vocabulary
from fedlm.errors import DataError, FedlmError
from fedlm.losses.nce import nce_loss
from fedlm.losses.negatives import NoiseDistribution
from fedlm.models.base import LanguageModel
from fedlm.models.factory import build_model
from fedlm.models.weights import weights
from fedlm.pretraining.cache import save_base
from fedlm.randomness import seed_key, stream

WARM_UP = 0.1  # share of the steps
REPORT_EVERY = 20


def pretrain(config: Config, vocabulary: Vocabulary, listener: Callable[[dict[str, object]], None]) -> Path:
    """Train the base of this config and store it in the cache; returns its folder.

    Raises:
        DataError: There is no public text.
        FedlmError: It took longer than `pretrain.max_seconds`.
    """
    text = _public_sequences(config, vocabulary)
    model = build_model(config, vocabulary.frequencies, config.seed)
    trainer = _CentralTrainer(model, config, vocabulary)
    steps_per_epoch = -(-len(text.inputs) // config.pretrain.batch_size)
    num_steps = config.pretrain.epochs * steps_per_epoch
    started, losses = time.monotonic(), []
    for step, batch in enumerate(_epochs(text, config)):
        losses.append(trainer.step(batch, step, num_steps))
        if step % REPORT_EVERY == 0 or step + 1 == num_steps:
            mean = float(np.mean(losses[-REPORT_EVERY:]))
            listener({"event": "pretrain", "step": step + 1, "steps": num_steps, "loss": mean})
        if time.monotonic() - started > config.pretrain.max_seconds:
            raise FedlmError(
                f"pretraining is at step {step + 1} of {num_steps} after pretrain.max_seconds = "
                f"{config.pretrain.max_seconds:.0f} s; raise it, or lower pretrain.epochs or the model's size"
            )
    meta = {"steps": num_steps, "tokens": int(text.mask.sum()), "loss": losses[-1]}
    return save_base(config, weights(model), meta)


def _public_sequences(config: Config, vocabulary: Vocabulary) -> Batch:
    """All public text as one stack of sequences."""
    length = config.data.sequence_length
    if config.pretrain.corpus == "public":
        store, users = _store_and_public_users(config, vocabulary)
    else:
        data = DataConfig(corpus=config.pretrain.corpus, split_by=config.data.split_by, sequence_length=length,
                          max_tokens_per_user=2**31 - 1, public_fraction=0.5, eval_fraction=0.1,
                          cache_dir=config.data.cache_dir)  # fmt: skip
        store = build_store(replace(config, data=data), vocabulary)
        users = np.concatenate([store.users("public"), store.users("train")])
    if not len(users):
        raise DataError("there is no public user to train the base on; raise data.public_fraction above 0")
    parts = [sequences(store.tokens(int(user)), length) for user in users]
    parts = [p for p in parts if p.inputs.shape[1] == length]
    if not parts:
        raise DataError(f"no public user has {length} tokens (data.sequence_length); lower it or give more text")
    return Batch(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("inputs", "targets", "mask")))


def _store_and_public_users(config: Config, vocabulary: Vocabulary) -> tuple[TokenStore, np.ndarray]:
    store = build_store(config, vocabulary)
    return store, store.users("public")


def _epochs(text: Batch, config: Config) -> Iterator[Batch]:
    size = config.pretrain.batch_size
    for epoch in range(config.pretrain.epochs):
        order = stream(seed_key(config.seed), "pretrain", epoch).permutation(len(text.inputs))
        for start in range(0, len(order), size):
            part = order[start : start + size]
            yield Batch(text.inputs[part], text.targets[part], text.mask[part])


class _CentralTrainer:
    """AdamW for the body, sparse Adam for the tables."""

    def __init__(self, model: LanguageModel, config: Config, vocabulary: Vocabulary) -> None:
        self._model, self._config = model.train(), config
        loss = LossConfig(negatives=config.pretrain.negatives)
        self._noise = NoiseDistribution(vocabulary.frequencies, loss, np.empty(0, np.int64))
        self._log_expected = torch.from_numpy(self._noise.log_expected)  # (V,)
        self._local_index = torch.zeros(vocabulary.size, dtype=torch.int64)  # (V,) scratch
        self._tables = [nn.Parameter(model.input_table.detach().clone())]  # (V, D)
        if not model.tied:
            self._tables.append(nn.Parameter(model.output_table.detach().clone()))  # (V, D)
        if model.output_bias is not None:
            self._bias = nn.Parameter(model.output_bias.detach().clone()[:, None])  # (V, 1)
            self._tables.append(self._bias)
        model.set_tables(
            input_table=self._tables[0].detach(),
            output_table=None if model.tied else self._tables[1].detach(),
            output_bias=None if model.output_bias is None else self._bias.detach()[:, 0],
        )
        body = [p.requires_grad_(True) for _, p in model.body_parameters()]
        decay = config.pretrain.weight_decay
        groups = [
            {"params": [p for p in body if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in body if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self._optimisers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=config.pretrain.learning_rate),
            torch.optim.SparseAdam(self._tables, lr=config.pretrain.learning_rate),
        ]

    def step(self, batch: Batch, step: int, num_steps: int) -> float:
        """One step on a batch; returns its loss."""
        rate = self._config.pretrain.learning_rate * schedule(step, num_steps)
        for optimiser in self._optimisers:
            optimiser.zero_grad()
            for group in optimiser.param_groups:
                group["lr"] = rate
        negatives = self._noise.draw(stream(seed_key(self._config.seed), "pretrain/negatives", step))
        loss = self._loss(batch, negatives)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimiser in self._optimisers:
            optimiser.step()
        return loss.item()

    def _loss(self, batch: Batch, negatives: np.ndarray) -> Tensor:
        model, index = self._model, self._local_index
        ids = torch.from_numpy(np.unique(np.concatenate([batch.inputs.ravel(), batch.targets.ravel(), negatives])))
        index[ids] = torch.arange(len(ids))
        table_in = embedding(ids, self._tables[0], sparse=True)  # (L, D)
        table_out = table_in if model.tied else embedding(ids, self._tables[1], sparse=True)  # (L, D)
        bias = None if model.output_bias is None else embedding(ids, self._bias, sparse=True)[:, 0]  # (L,)
        mask = torch.from_numpy(batch.mask)  # (B, T)
        hidden = model.body(model.embed(embedding(index[torch.from_numpy(batch.inputs)], table_in)), mask)[
            mask
        ]  # (N, D)
        targets = index[torch.from_numpy(batch.targets)[mask]]  # (N,)
        local_negatives = index[torch.from_numpy(negatives)]  # (K,)
        return nce_loss(hidden, targets, local_negatives, table_out, bias, self._log_expected[ids])


def schedule(step: int, num_steps: int) -> float:
    """Return the factor of the learning rate: a linear warm-up, then a cosine down to a tenth."""
    warm_up = max(1, round(WARM_UP * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, num_steps - warm_up)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
