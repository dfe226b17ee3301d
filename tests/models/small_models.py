"""Small models of every kind, with random weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fedlm.config.schema import Config, DataConfig, ModelConfig
from fedlm.models.base import LanguageModel
from fedlm.models.factory import build_model
from fedlm.models.pretrained import PretrainedModel

VOCABULARY, LENGTH = 61, 80
KINDS = ("transformer", "lstm", "gpt2", "llama")

ModelMaker = Callable[..., LanguageModel]


def small_model(kind: str, *, tied: bool = True, seed: int = 3, **model: object) -> LanguageModel:
    if kind in ("gpt2", "llama"):
        torch.manual_seed(seed)  # transformers knows no other way
        return PretrainedModel(small_hugging_face(kind, tied=tied)).eval()
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_hidden": 12} | model
    config = Config(
        data=DataConfig(sequence_length=LENGTH),
        model=ModelConfig(name=kind, tied=tied, **sizes),  # type: ignore[arg-type]
    )
    frequencies = np.random.default_rng(seed).dirichlet(np.ones(VOCABULARY))
    return build_model(config, frequencies, seed).eval()


def small_hugging_face(kind: str, *, tied: bool = True, **settings: object) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if kind == "gpt2":
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied,
                            n_positions=LENGTH, bos_token_id=0, eos_token_id=0)  # fmt: skip
        return GPT2LMHeadModel(config)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=24, tie_word_embeddings=tied,
                         **settings)  # fmt: skip
    return LlamaForCausalLM(config)
