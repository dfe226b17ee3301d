"""fedlm's side of the example-level DP comparison.

The classifier is the stock module behind a task; the language model goes through the seam for pretrained models, which
turns GPT-2's transposed products into linear modules and keeps the table outside of the model's parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from benchmarks.example_dp_models import ALPHA, CLIP_NORM, RANK, TABLE, Inputs, choose, fill, losses
from fedlm.config.load import load_config
from fedlm.config.schema import Config
from fedlm.data.batching import Batch
from fedlm.example_dp.clip_rule import SLACK, ClipRule
from fedlm.example_dp.engine import PerExampleEngine
from fedlm.example_dp.language import LanguageTask
from fedlm.example_dp.per_example_gradients import PerExampleGradients
from fedlm.example_dp.tables.phantom import TrainedTables
from fedlm.example_dp.task import Task
from fedlm.models.pretrained import PretrainedModel
from fedlm.models.table_names import INPUT_TABLE
from fedlm.trainable.build import Trainable, build_trainable

_TRAINED = {
    "full": ["trainable.dense=['*']"],
    "body": ["trainable.dense=['*']"],
    "bias": ["trainable.bias=true"],
    "lora": [],
}


class StockTask(Task[Inputs]):
    """A stock model that trains in place.

    Arguments:
        model: The stock model.
        trained: Its trained parameters by name.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        self.model, self.trained = model, trained

    def num_examples(self, batch: Inputs) -> int:
        """Return B."""
        return len(batch.tokens)

    def losses(self, batch: Inputs, per_example: PerExampleGradients) -> Tensor:
        """Return (B,)."""
        return losses(self.model, batch)


class Classifier:
    """Any scope of the classifier."""

    def __init__(self, model: nn.Module, kind: str, scope: str) -> None:
        self._engine = PerExampleEngine(StockTask(model, choose(model, kind, scope)))

    def step(self, inputs: Inputs) -> Mapping[str, Tensor]:
        """Return the clipped sum."""
        return self._engine.clipped(inputs, _rule()).sums

    def stock_names(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the sums as they are."""
        return sums


class Language:
    """Any scope of the language model; "full" trains the tied table too, by Phantom Clipping."""

    def __init__(self, model: nn.Module, kind: str, scope: str) -> None:
        trainable, config = _behind_the_seam(model, scope)
        frequencies = np.full(trainable.model.vocabulary_size, 1 / trainable.model.vocabulary_size)
        tables = frozenset({INPUT_TABLE} if scope == "full" else ())
        task = LanguageTask(trainable, config, frequencies, tables=tables, negatives_key=b"benchmark")
        self._engine = PerExampleEngine(task)

    def step(self, inputs: Inputs) -> Mapping[str, Tensor]:
        """Return the clipped sum."""
        everywhere = np.ones(inputs.tokens.shape, np.bool_)  # (B, T)
        batch = Batch(inputs.tokens.numpy(), inputs.targets.numpy(), everywhere)
        return self._engine.clipped(batch, _rule()).sums

    def stock_names(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the sums under GPT-2's names, its products transposed back."""
        return {TABLE if name == INPUT_TABLE else name: _untransposed(name, value) for name, value in sums.items()}


class PlainWithOurHead:
    """Non-private training by autograd through the same seam and the same chunked head, whose table is frozen."""

    def __init__(self, model: nn.Module, kind: str, scope: str) -> None:
        self._trainable, self._config = _behind_the_seam(model, scope)
        self._head = TrainedTables(
            input_table=self._trainable.model.input_table, output_table=None, output_bias=None, trained=frozenset()
        )

    def step(self, inputs: Inputs) -> Mapping[str, Tensor]:
        """Return the sum of gradients, not clipped."""
        model, parameters = self._trainable.model, self._trainable.parameters
        model.zero_grad(set_to_none=True)
        mask = torch.ones_like(inputs.tokens, dtype=torch.bool)  # (B, T)
        hidden = model.body(model.embed(embedding(inputs.tokens, model.input_table)), mask)  # (B, T, D)
        per_example, chunk = PerExampleGradients(len(inputs.tokens)), self._config.loss.chunk
        each = self._head.full_softmax(per_example, hidden, inputs.targets, mask, chunk)  # (B,)
        each.sum().backward()  # type: ignore[no-untyped-call]
        return {name: p.grad for name, p in parameters.items() if p.grad is not None}

    def stock_names(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the sums under GPT-2's names."""
        return {name: _untransposed(name, value) for name, value in sums.items()}


def ours(kind: str) -> type[Classifier] | type[Language]:
    """Return fedlm's side for a kind of model."""
    return Classifier if kind == "classifier" else Language


def _behind_the_seam(model: nn.Module, scope: str) -> tuple[Trainable, Config]:
    rank = RANK if scope == "lora" else 0
    lora = [f"trainable.lora.rank={rank}", f"trainable.lora.alpha={ALPHA}"]
    common = ["loss.kind='full_softmax'", "trainable.embedding_rows.count=0"]
    config = load_config(None, [*common, *lora, *_TRAINED[scope]])
    trainable = build_trainable(PretrainedModel(model), config)
    fill({name: parameter for name, parameter in trainable.parameters.items() if ".lora_" in name})
    return trainable, config


def _rule() -> ClipRule:
    """Return the rule whose factors are those of the other sides: the norm is given its slack back."""
    return ClipRule("flat", CLIP_NORM * (1 + SLACK))


def _untransposed(name: str, value: Tensor) -> Tensor:
    """Return a weight as GPT-2 stores it; adapters keep their shape."""
    is_product = name.endswith("weight") and value.dim() == 2 and ".h." in name and ".lora_" not in name
    return value.T if is_product else value


def side(row_side: str, kind: str) -> Any:
    """Return the class of one of fedlm's rows.

    Arguments:
        row_side: "ours" or "plain, our head".
        kind: The model.
    """
    return PlainWithOurHead if row_side == "plain, our head" else ours(kind)
