"""Adapters cross between fedlm and peft in both directions, onto stock Hugging Face models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from fedlm.config.load import load_config
from fedlm.config.schema import Config
from fedlm.errors import DataError
from fedlm.export.adapter import save_adapter
from fedlm.models.base import LanguageModel
from fedlm.models.factory import build_model
from fedlm.models.pretrained import PretrainedModel
from fedlm.privacy.guarantee import Guarantee
from fedlm.trainable.build import build_trainable

NOTHING = Guarantee("user", "add or remove one", math.inf, 1e-6, (), ("NOT PRIVATE: a test of shapes",))
TOKENS = torch.arange(12).reshape(2, 6)


def stock(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        ).eval()
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).eval()  # fmt: skip


def config(*overrides: str) -> Config:
    small = ["vocabulary.size=50", "pretrain.negatives=10", "loss.negatives=10", "trainable.embedding_rows.count=0",
             "model.d_model=16", "model.num_heads=2", "trainable.lora.rank=3"]  # fmt: skip
    return load_config(None, [*small, *overrides])


def logits(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        scores = model.hidden(TOKENS) @ model.output_table.T
        return scores if model.output_bias is None else scores + model.output_bias


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:`is_gradient_checkpointing`:FutureWarning")
def test_ours_loads_in_peft_and_theirs_in_ours(kind: str, tmp_path: Path) -> None:
    c = config()
    trainable = build_trainable(PretrainedModel(stock(kind)), c)
    rng = np.random.default_rng(1)
    values = trainable.initial_values()
    values += 0.3 * rng.standard_normal(len(values)).astype(np.float32)
    blocks = trainable.spec.views(values)
    trainable.load(blocks)
    save_adapter(trainable.model, blocks, c.trainable.lora, tmp_path / "ours", base=kind, guarantee=NOTHING)
    theirs = peft.PeftModel.from_pretrained(stock(kind), str(tmp_path / "ours"))
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS).logits
        plain = stock(kind)(input_ids=TOKENS).logits
    torch.testing.assert_close(logits(trainable.model), expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).abs().max() > 0.01, "the adapter does something"
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)  # else it asks a hub
    again = build_trainable(PretrainedModel(stock(kind)), config(f"trainable.lora.adapter={tmp_path / 'theirs'}"))
    assert np.array_equal(again.initial_values(), values)


@pytest.mark.parametrize("freeze_a", ["true", "false"])
def test_round_trip_of_our_own_model(freeze_a: str, tmp_path: Path) -> None:
    frequencies = np.full(50, 0.02)
    c = config(f"trainable.lora.freeze_a={freeze_a}")
    trainable = build_trainable(build_model(c, frequencies, 1), c)
    values = trainable.initial_values() + np.float32(0.1)
    trainable.load(trainable.spec.views(values))
    save_adapter(
        trainable.model, trainable.spec.views(values), c.trainable.lora, tmp_path / "a", base="ours", guarantee=NOTHING
    )
    other_seed = config(f"trainable.lora.freeze_a={freeze_a}", f"trainable.lora.adapter={tmp_path / 'a'}", "seed=9")
    assert len({file.stat().st_mode for file in (tmp_path / "a").iterdir()}) == 1  # to be published, all of it
    again = build_trainable(build_model(c, frequencies, 1), other_seed)
    torch.testing.assert_close(logits(again.model), logits(trainable.model), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["trainable.lora.rank=4"], "lora.rank"), (["trainable.lora.targets=['mlp']"], "lora.targets")],
)
def test_an_adapter_that_does_not_fit_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    c = config()
    trainable = build_trainable(build_model(c, np.full(50, 0.02), 1), c)
    save_adapter(trainable.model, {}, c.trainable.lora, tmp_path / "a", base="ours", guarantee=NOTHING)
    wrong = config(*overrides, f"trainable.lora.adapter={tmp_path / 'a'}")
    with pytest.raises(DataError, match=message):
        build_trainable(build_model(wrong, np.full(50, 0.02), 1), wrong)
    missing = config(f"trainable.lora.adapter={tmp_path / 'none'}")
    with pytest.raises(DataError, match="can be read"):
        build_trainable(build_model(missing, np.full(50, 0.02), 1), missing)
