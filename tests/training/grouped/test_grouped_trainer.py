"""Group training against the one-device reference: the same update for every model, loss and kind of trainable."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedlm.config.load import load_config
from fedlm.config.schema import Config
from fedlm.models.base import LanguageModel
from fedlm.models.factory import build_model
from fedlm.models.pretrained import PretrainedModel
from fedlm.randomness import round_key
from fedlm.trainable.build import Trainable, build_trainable
from fedlm.trainable.parts import dense
from fedlm.trainable.rows import row_set
from fedlm.trainable.spec import UpdateSpec, Vector
from fedlm.training.grouped.trainer import GroupResult, GroupTrainer, why_not_grouped
from fedlm.training.local import LocalResult, LocalTrainer

V, KEY = 60, round_key(1, 1)
FREQUENCIES = 1 / np.arange(3.0, V + 3)
FREQUENCIES /= FREQUENCIES.sum()
LENGTHS = (75, 40, 12, 3, 1, 0, 130, 76)  # none, one and many batches; a last sequence whole, cut and of one token
BASE = [
    "vocabulary.size=60", "model.d_model=16", "model.num_layers=2", "model.num_heads=2", "pretrain.negatives=20",
    "data.sequence_length=12", "local.batch_size=3", "local.learning_rate=0.1", "local.row_learning_rate=0.02",
    "loss.negatives=20", "loss.chunk=17", "execution.group_size=8",
]  # fmt: skip
NONE = ["trainable.lora.rank=0", "trainable.embedding_rows.count=0"]
KINDS = {
    "lora": ["trainable.lora.rank=4", "trainable.embedding_rows.count=0"],
    "frozen_a": ["trainable.lora.rank=4", "trainable.lora.freeze_a=true", "trainable.embedding_rows.count=0"],
    "bias": [*NONE, "trainable.bias=true"],
    "dense": [*NONE, "trainable.dense=['*']"],
    "rows": ["trainable.lora.rank=0", "trainable.embedding_rows.count=20"],
    "all": ["trainable.lora.rank=4", "trainable.bias=true", "trainable.embedding_rows.count=20"],
}
MODELS = {"transformer": [], "lstm": ["model.name=lstm", "trainable.lora.targets=['recurrent']", "model.d_hidden=24"]}
LOSSES = ("nce", "sampled_softmax", "full_softmax")


def texts(lengths: tuple[int, ...] = LENGTHS, seed: int = 5) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, V, n).astype(np.int32) for n in lengths]


def config(*overrides: str) -> Config:
    return load_config(None, [*BASE, *overrides])


class Round:
    """One round of an experiment, ready for both programs."""

    def __init__(self, c: Config, model: LanguageModel | None = None) -> None:
        self.trainable = _trainable(c, model)
        self.blocks = self.trainable.initial_blocks(copy_tables=False)
        self.trainable.bind_tables(self.blocks)
        ids = row_set(c.trainable.embedding_rows, FREQUENCIES, seed=1, round_number=1)
        self.spec: UpdateSpec = self.trainable.spec.with_rows(ids)
        self.config = c

    def one_by_one(self, tokens: list[np.ndarray]) -> list[LocalResult]:
        trainer = LocalTrainer(self.trainable, self.config, FREQUENCIES)
        trainer.start_round(self.spec, self.blocks)
        return [trainer.train(text, key=KEY, device=d) for d, text in enumerate(tokens)]

    def group_trainer(self) -> GroupTrainer:
        trainer = GroupTrainer(self.trainable, self.config, FREQUENCIES)
        trainer.start_round(self.spec, self.blocks)
        return trainer

    def in_groups(self, tokens: list[np.ndarray]) -> list[GroupResult]:
        trainer = self.group_trainer()
        step = trainer.largest_group
        cuts = [range(start, min(start + step, len(tokens))) for start in range(0, len(tokens), step)]
        return [
            result
            for devices in cuts
            for result in trainer.train([tokens[d] for d in devices], key=KEY, devices=devices)
        ]

    def rounding(self, update: Vector) -> Vector:
        """1e-5 of the values that the update is a difference of, and of the update itself."""
        values = [np.ravel(self.blocks[b.name][self._rows(b.kind)]) for b in self.spec.blocks]
        return 1e-5 * (np.abs(np.concatenate(values)) + np.abs(update).max(initial=0)) + 1e-8

    def _rows(self, kind: str) -> object:
        return self.spec.row_ids if kind == "rows" else ...


def _trainable(c: Config, model: LanguageModel | None) -> Trainable:
    trainable = build_trainable(model or build_model(c, FREQUENCIES, c.seed), c)
    with torch.no_grad():  # adapters start at zero product; give B something so that A gets a gradient too
        generator = torch.Generator().manual_seed(0)
        for name, parameter in trainable.parameters.items():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trainable


def assert_same(c: Config, tokens: list[np.ndarray], model: LanguageModel | None = None) -> None:
    a_round = Round(c, model)
    expected, found = a_round.one_by_one(tokens), a_round.in_groups(tokens)
    for one, grouped in zip(expected, found, strict=True):
        update = dense(grouped.parts, a_round.spec.size)
        assert (np.abs(update - one.update) <= a_round.rounding(one.update)).all()
        assert grouped.loss == pytest.approx(one.loss, rel=1e-5)
        assert grouped.num_tokens == one.num_tokens
    assert max(np.abs(one.update).max() for one in expected) > 1e-4


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_group_equals_one_by_one(model: str, kind: str, loss: str) -> None:
    assert_same(config(*MODELS[model], *KINDS[kind], f"loss.kind={loss}"), texts())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tied", ["true", "false"])
def test_epochs_dropout_and_untied_tables(model: str, loss: str, tied: str) -> None:
    others = ["model.dropout=0.2", "local.epochs=2", f"model.tied={tied}"]
    if loss != "full_softmax":
        others.append("loss.negatives_from=rows")
    assert_same(config(*MODELS[model], *KINDS["all"], f"loss.kind={loss}", *others), texts())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["lora", "bias", "all"])
def test_a_hugging_face_model_equals_one_by_one(kind: str, loss: str) -> None:
    """GPT-2 is made of leaves that groups know, and has no output bias."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=V, bos_token_id=0, eos_token_id=0, **sizes))
    assert_same(config(*KINDS[kind], f"loss.kind={loss}"), texts(), PretrainedModel(gpt2))


def test_a_tensor_that_no_leaf_knows_trains_one_by_one() -> None:
    """Llama's norms are its own kind of module: groups refuse to train them, and nothing else of it."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    for kind, is_known in (("lora", True), ("dense", False)):
        c = config(*KINDS[kind])
        llama = PretrainedModel(LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes)))
        assert (why_not_grouped(_trainable(c, llama), c) == "") == is_known


def test_small_steps_of_large_biases_are_not_lost_in_rounding() -> None:
    """Log frequencies are near -10 and a token's share of a step near 1e-6: terms must be added up before the bias."""
    c = config(*NONE, "trainable.embedding_rows.count=60", "trainable.embedding_rows.sampler=top_k",
               "loss.kind=full_softmax", "local.learning_rate=0.001", "data.sequence_length=120")  # fmt: skip
    for loss in ("full_softmax", "nce"):
        a_round = Round(replace(c, loss=replace(c.loss, kind=loss)))
        a_round.blocks["output_bias"] -= 12
        tokens = texts((361,))
        expected, found = (
            a_round.one_by_one(tokens)[0].update,
            dense(a_round.in_groups(tokens)[0].parts, a_round.spec.size),
        )
        bias = next(block for block in a_round.spec.blocks if block.name == "output_bias")
        rounding = 2 * np.spacing(np.abs(a_round.blocks["output_bias"]))
        assert (np.abs(bias.view(found) - bias.view(expected)) <= rounding).all()
        assert (bias.view(expected) != 0).mean() > 0.9


def test_whole_model_with_the_full_softmax() -> None:
    everything = ["trainable.dense=['*']", "trainable.lora.rank=0", "trainable.embedding_rows.count=60",
                  "trainable.embedding_rows.sampler=top_k", "loss.kind=full_softmax"]  # fmt: skip
    assert_same(config(*everything, "model.dropout=0.1"), texts())


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=8),
    seed=st.integers(0, 2**16),
    loss=st.sampled_from(LOSSES[:2]),
)
def test_any_group_equals_one_by_one(lengths: list[int], seed: int, loss: str) -> None:
    a_round = Round(config(*KINDS["all"], f"loss.kind={loss}"))
    tokens = texts(tuple(lengths), seed)
    for one, grouped in zip(a_round.one_by_one(tokens), a_round.in_groups(tokens), strict=True):
        update = dense(grouped.parts, a_round.spec.size)
        assert (np.abs(update - one.update) <= a_round.rounding(one.update)).all()


def test_the_same_group_gives_the_same_bits_whatever_came_before() -> None:
    trainer = Round(config(*KINDS["all"], "model.dropout=0.1")).group_trainer()
    tokens = texts()
    first = trainer.train(tokens, key=KEY, devices=range(8))
    trainer.train(texts(seed=9), key=KEY, devices=range(8, 16))
    again = trainer.train(tokens, key=KEY, devices=range(8))
    for one, other in zip(first, again, strict=True):
        assert one.loss == other.loss
        assert all(np.array_equal(a.values, b.values) for a, b in zip(one.parts, other.parts, strict=True))


def test_a_diverging_device_leaves_its_group_alone() -> None:
    """One device trains on huge rows and overflows; the others' updates are finite and right."""
    a_round = Round(config(*KINDS["lora"]))
    a_round.blocks = {name: values.copy() for name, values in a_round.blocks.items()}
    table = a_round.trainable.model.input_table.clone()
    table[59] = torch.inf
    a_round.trainable.model.set_tables(input_table=table)
    tokens = [np.full(20, 59, np.int32), *texts((40, 30))]
    tokens[1:] = [np.where(text == 59, 58, text).astype(np.int32) for text in tokens[1:]]
    c = config(*KINDS["lora"], "loss.negatives_from=vocabulary")
    frequencies = FREQUENCIES.copy()
    frequencies[59] = 0  # nobody else draws it
    local, group = LocalTrainer(a_round.trainable, c, frequencies), GroupTrainer(a_round.trainable, c, frequencies)
    local.start_round(a_round.spec, a_round.blocks)
    group.start_round(a_round.spec, a_round.blocks)
    updates = [dense(r.parts, a_round.spec.size) for r in group.train(tokens, key=KEY, devices=range(3))]
    assert not np.isfinite(updates[0]).all()
    for d in (1, 2):
        expected = local.train(tokens[d], key=KEY, device=d).update
        assert (np.abs(updates[d] - expected) <= a_round.rounding(expected)).all()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=8),
    words=st.sampled_from([(0, 1), (0, V), (V - 1, V)]),
    rate=st.sampled_from([0.1, 30.0, 1e38]),
    kind=st.sampled_from(sorted(KINDS)),
    loss=st.sampled_from(LOSSES),
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_no_text_makes_a_group_raise(
    lengths: list[int], words: tuple[int, int], rate: float, kind: str, loss: str
) -> None:
    """A group that raised because of a text would have its round done again, or ended, because of a device's data."""
    rates = [f"local.learning_rate={rate}", f"local.row_learning_rate={rate}"]
    rng = np.random.default_rng(len(lengths))
    tokens = [rng.integers(*words, n).astype(np.int32) for n in lengths]
    results = Round(config(*KINDS[kind], f"loss.kind={loss}", *rates)).in_groups(tokens)
    assert len(results) == len(tokens)


@pytest.mark.parametrize("kind", ["lora", "bias", "all"])
def test_bf16_is_close_and_changes_no_trained_type(kind: str) -> None:
    plain, half = Round(config(*KINDS[kind])), Round(config(*KINDS[kind], "execution.products=bf16"))
    differs = False
    for one, other in zip(plain.in_groups(texts()), half.in_groups(texts()), strict=True):
        a, b = dense(one.parts, plain.spec.size), dense(other.parts, plain.spec.size)
        assert b.dtype == np.float32
        assert np.linalg.norm(a - b) <= 0.05 * np.linalg.norm(a) + 1e-6
        differs |= bool((a != b).any())
    assert differs
