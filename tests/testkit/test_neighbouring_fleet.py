"""The check of neighbouring fleets: our trainer passes it with everything that trains, wrong trainers do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedlm.config.load import load_config
from fedlm.config.schema import Config
from fedlm.errors import ConfigError
from fedlm.models.pretrained import PretrainedModel
from fedlm.models.table_names import INPUT_TABLE
from fedlm.testkit import PrivacyTestFailure, check_neighbouring_fleets
from fedlm.trainable.parts import Part
from fedlm.training.grouped.embedding_rows import OwnRows
from fedlm.training.grouped.trainer import GroupResult, GroupTrainer
from fedlm.training.grouped.whole_table import WholeTable

ROWS = ["trainable.lora.rank=0", "trainable.embedding_rows.count=20"]
KINDS = {
    "lora": ["trainable.lora.rank=4", "trainable.embedding_rows.count=0"],
    "rows": ROWS,
    "everything": [*ROWS, "trainable.dense=['*']"],
}
MODELS = {"transformer": [], "lstm": ["model.name=lstm", "trainable.lora.targets=['recurrent']"]}


def config(*options: str) -> Config:
    return load_config(None, options)


@pytest.mark.parametrize(
    ("model", "kind", "loss"),
    [
        ("transformer", "lora", "nce"),
        ("transformer", "everything", "nce"),
        ("transformer", "rows", "full_softmax"),
        ("lstm", "everything", "sampled_softmax"),
    ],
)
def test_groups_pass(model: str, kind: str, loss: str) -> None:
    check_neighbouring_fleets(config(*MODELS[model], *KINDS[kind], f"loss.kind={loss}"))


def test_a_model_of_ones_own_is_examined() -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12}
    gpt2 = PretrainedModel(GPT2LMHeadModel(GPT2Config(vocab_size=60, bos_token_id=0, eos_token_id=0, **sizes)))
    check_neighbouring_fleets(config(*ROWS), model=gpt2)
    with pytest.raises(ConfigError, match="untie"):
        check_neighbouring_fleets(config(*ROWS, "loss.kind=full_softmax"), model=gpt2)


class _SharedRows(OwnRows):
    """Padding reads the row into which the gradients of frozen rows are written, as it once did."""

    def _fill(self, ids: Any) -> None:
        super()._fill(ids)
        self.padding += 1
        self.input = self._tables[INPUT_TABLE]
        self.output, self.bias = self._tables.get("output_table", self.input), self._tables.get("output_bias")
        self.log_expected = torch.cat([self.log_expected, torch.zeros(1)])
        self._target = torch.cat([self._target, self._target[-1:]])


class _SharedTable(WholeTable):
    """The next device finds the column of ones as the last one left it, as it once did."""

    def open(self, occurrences: Any) -> Any:
        before = self.wide[:, -1].clone()
        places = super().open(occurrences)
        if before.any():
            self.wide[:, -1] = before
        return places


class _SharedRowsTrainer(GroupTrainer):
    def train(self, *arguments: Any, **named: Any) -> list[GroupResult]:
        with patch("fedlm.training.grouped.trainer.OwnRows", _SharedRows):
            return super().train(*arguments, **named)


class _SharedTableTrainer(GroupTrainer):
    def __init__(self, *arguments: Any) -> None:
        with patch("fedlm.training.grouped.trainer.WholeTable", _SharedTable):
            super().__init__(*arguments)


class _AllOrNothing(GroupTrainer):
    """A group in which somebody diverges contributes nothing."""

    def train(self, *arguments: Any, **named: Any) -> list[GroupResult]:
        results = super().train(*arguments, **named)
        if all(np.isfinite(part.values).all() for result in results for part in result.parts):
            return results
        return [_scaled(result, 0) for result in results]


class _SmallestGroup(GroupTrainer):
    """A group's updates are larger the fewer devices it has."""

    def train(self, tokens: Sequence[Any], **named: Any) -> list[GroupResult]:
        return [_scaled(result, 1 / len(tokens)) for result in super().train(tokens, **named)]


def _scaled(result: GroupResult, factor: float) -> GroupResult:
    parts = [Part(p.offset, np.nan_to_num(p.values) * np.float32(factor), p.rows) for p in result.parts]
    return replace(result, parts=parts)


WRONG: dict[str, tuple[type[GroupTrainer], list[str], str]] = {
    "padding reads what frozen rows' gradients are written into": (_SharedRowsTrainer, [], "changes .* coordinates"),
    "a table of its own that keeps what the last device left": (
        _SharedTableTrainer,
        ["loss.kind=full_softmax"],
        "changes .* coordinates",
    ),
    "a group in which somebody diverges is left out": (_AllOrNothing, [], "changes .* coordinates"),
    "updates that depend on the size of the group": (_SmallestGroup, [], "without device 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_trainers_are_caught(name: str) -> None:
    trainer, options, sentence = WRONG[name]
    with pytest.raises(PrivacyTestFailure, match=f"neighbouring fleets: .*{sentence}"):
        check_neighbouring_fleets(config(*ROWS, *options), trainer=trainer)


def test_what_cannot_train_in_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match="one by one"):
        check_neighbouring_fleets(config(*ROWS, "model.re_attention=absolute"))
