"""What every model must do, whatever its kind."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import KINDS, VOCABULARY, ModelMaker
from torch import nn

from fedlm.errors import DataError
from fedlm.models.base import LanguageModel

TOKENS = torch.from_numpy(np.random.default_rng(5).integers(0, VOCABULARY, (3, 11)))


@torch.no_grad()
@pytest.mark.parametrize("length", [11, 70])  # both ways to compute attention
def test_a_token_changes_no_state_before_it(model: LanguageModel, length: int) -> None:
    tokens = torch.arange(2 * length).view(2, length) % VOCABULARY
    place = length - 3
    changed = tokens.clone()
    changed[:, place] += 1
    changed %= VOCABULARY
    before, after = model.hidden(tokens), model.hidden(changed)
    torch.testing.assert_close(before[:, :place], after[:, :place], rtol=0, atol=1e-6)
    assert ((before[:, place:] - after[:, place:]).abs().amax((0, 2)) > 1e-6).all()


@torch.no_grad()
def test_padding_changes_no_real_state(model: LanguageModel) -> None:
    lengths = torch.tensor([4, 11, 7])
    mask = torch.arange(11) < lengths[:, None]  # (B, T)
    padded = model.hidden(TOKENS.where(mask, 9), mask)
    assert padded.isfinite().all()
    for row, length in enumerate(lengths.tolist()):
        alone = model.hidden(TOKENS[row : row + 1, :length])[0]
        torch.testing.assert_close(padded[row, :length], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_do_not_see_each_other(model: LanguageModel) -> None:
    together = model.hidden(TOKENS)
    for row in range(len(TOKENS)):
        torch.testing.assert_close(together[row], model.hidden(TOKENS[row : row + 1])[0], rtol=0, atol=1e-5)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_a_compact_table_of_the_rows_in_play_gives_the_same_states_and_gradients(seed: int) -> None:
    from small_models import small_model

    model = small_model("transformer", num_layers=1)
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, VOCABULARY, (2, 5)))
    ids, local = tokens.unique(return_inverse=True)
    compact = model.input_table[ids].requires_grad_()  # (S, D)
    whole = model.input_table.clone().requires_grad_()  # (V, D)
    gradients = []
    for table, index in ((compact, local), (whole, tokens)):
        states = model.body(model.embed(table[index]))
        gradients.append(torch.autograd.grad(states.square().sum(), table)[0])
    torch.testing.assert_close(gradients[0], gradients[1][ids])


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_no_parameters_and_tying_means_one_tensor(make_model: ModelMaker, kind: str) -> None:
    tied, untied = make_model(kind), make_model(kind, tied=False)
    assert tied.output_table is tied.input_table
    assert not torch.equal(untied.output_table, untied.input_table)
    for model in (tied, untied):
        shapes = {tuple(p.shape) for _, p in model.body_parameters()}
        assert (model.vocabulary_size, model.d_model) not in shapes
        assert not any(VOCABULARY in shape for shape in shapes)
        assert not model.input_table.requires_grad


def test_set_tables_shares_memory_and_keeps_a_tie(model: LanguageModel) -> None:
    table = torch.randn(VOCABULARY, model.d_model, generator=torch.Generator().manual_seed(1))
    model.set_tables(input_table=table)
    assert model.output_table is model.input_table
    before = model.hidden(TOKENS).detach()
    table[TOKENS[0, 0], 0] += 1.0
    assert not torch.allclose(before[0, 0], model.hidden(TOKENS)[0, 0])


def test_set_tables_refuses_what_does_not_fit(make_model: ModelMaker) -> None:
    tied = make_model("llama")
    with pytest.raises(DataError, match=r"output_table given, but the model has none"):
        tied.set_tables(output_table=tied.input_table)
    with pytest.raises(DataError, match=r"output_bias given, but the model has none"):
        tied.set_tables(output_bias=torch.zeros(VOCABULARY))
    with pytest.raises(DataError, match=r"input_table is \(61, 15\) .* takes \(61, 16\)"):
        tied.set_tables(input_table=torch.zeros(VOCABULARY, 15))
    with pytest.raises(DataError, match=r"float64"):
        tied.set_tables(input_table=torch.zeros(VOCABULARY, 16, dtype=torch.float64))


EXPECTED_TARGETS = {
    "transformer": (["attention", "mlp"], ["attention.qkv", "attention.output", "mlp.up", "mlp.down"]),
    "lstm": (["recurrent"], ["input", "recurrent"]),
    "gpt2": (["attention", "mlp"], ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "llama": (
        ["attention", "mlp"],
        [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_groups_name_the_linear_modules_and_peft_adapts_exactly_those(make_model: ModelMaker, kind: str) -> None:
    model = make_model(kind)
    groups, endings = EXPECTED_TARGETS[kind]
    targets = model.named_linear_targets(groups)
    assert len(targets) == 2 * len(endings) == len(set(targets))
    assert all(any(t.endswith("." + e) for e in endings) for t in targets)
    shapes = {t: model.get_submodule(t).weight.shape for t in targets}
    before = model.hidden(TOKENS)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets), model)
    adapted = dict(model.body_parameters())
    for target, (out_features, in_features) in shapes.items():
        assert adapted[f"{target}.lora_A.default.weight"].shape == (2, in_features)
        assert adapted[f"{target}.lora_B.default.weight"].shape == (out_features, 2)
    assert sum(".lora_A." in name for name in adapted) == len(targets)
    torch.testing.assert_close(model.hidden(TOKENS), before)
    nn.init.normal_(adapted[f"{targets[-1]}.lora_B.default.weight"], std=10.0)
    assert not torch.allclose(model.hidden(TOKENS), before, atol=1e-4)


def test_literal_targets_match_whole_path_segments(make_model: ModelMaker) -> None:
    model = make_model("transformer", num_layers=12)
    assert model.named_linear_targets(["1.mlp.up"]) == ["blocks.1.mlp.up"]
    assert model.named_linear_targets(["up", "mlp"]) == model.named_linear_targets(["mlp"])


@pytest.mark.parametrize(
    ("kind", "group", "hint"),
    [
        ("transformer", "atention", r"did you mean 'attention'\?"),
        ("llama", "q_prj", r"did you mean 'q_proj'\?"),
        ("lstm", "attention", r"matches no linear module of LstmModel; it has recurrent"),
    ],
)
def test_a_target_that_matches_nothing_names_what_there_is(
    make_model: ModelMaker, kind: str, group: str, hint: str
) -> None:
    with pytest.raises(DataError, match=hint):
        make_model(kind).named_linear_targets([group])
