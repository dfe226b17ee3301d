"""Tiny random encoder folders with a word tokenizer, as `save_pretrained` writes them."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ("good", "bad", "film", "story", "very", "dull", "fine", "a", "the", "and")
SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
V = len(WORDS) + len(SPECIALS)


def small_encoder_folder(folder: Path, kind: str = "bert") -> Path:
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "bert":
            model = BertModel(BertConfig(vocab_size=V, max_position_embeddings=20, **sizes))
        elif kind == "roberta":
            model = RobertaModel(RobertaConfig(vocab_size=V, max_position_embeddings=20, pad_token_id=0, **sizes))
        else:
            shape = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 20}
            model = DistilBertModel(DistilBertConfig(vocab_size=V, **shape))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate((*SPECIALS, *WORDS))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
