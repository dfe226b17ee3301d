"""Any Hugging Face encoder (BERT, RoBERTa and their like) with a new linear classifier over its mean hidden state.

    logits = W mean_t h_t + b        over the real tokens t of a text

A folder's own pooler is dropped: sentence encoders have one that nobody trained, RoBERTa's files have none. The module
of the encoder has its stock name (`bert.encoder.layer.0...`), so adapters trained here load onto
`AutoModelForSequenceClassification` of the same folder.

Examples do not mix: attention is the plain product with a mask, whose weights at padding are exactly zero, positions
are given for each example, there is no dropout (it would draw from torch's global generator) and no batch norm.

Legend: B examples, T tokens, D width, K classes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlm.errors import DataError
from fedlm.models.base import matching_linears
from fedlm.models.layers import empty_linear
from fedlm.models.packages import packaged_model
from fedlm.models.pretrained import as_data_error, quietly
from fedlm.randomness import seed_key, stream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HEAD = "classifier"
_HEAD_STD = 0.02


class Encoder(nn.Module):
    """A transformers encoder with a classifier; a batch of token ids becomes logits.

    Arguments:
        source: The transformers model (`AutoModel`), float32; it is moved, not copied.
        num_classes: K.
        seed: Of the classifier's weight, N(0, 0.02^2); its bias starts at zero.

    Raises:
        DataError: A model without a plain word embedding, or a decoder.
    """

    def __init__(self, source: Any, num_classes: int, seed: int) -> None:
        super().__init__()
        name = type(source).__name__
        words = source.get_input_embeddings()
        if not isinstance(words, nn.Embedding) or getattr(source.config, "is_encoder_decoder", False):
            raise DataError(f"{name} is no encoder of tokens; use a folder of the kind of BERT or RoBERTa")
        if hasattr(source, "pooler"):
            source.pooler = None
        self.max_length = _longest(source)
        self.vocabulary_size, self.d_model = words.weight.shape
        self._own_positions = not _takes_positions(source)
        self._encoder = source.base_model_prefix or "encoder"
        self.add_module(self._encoder, source)
        self.classifier = empty_linear(self.d_model, num_classes)
        draw = stream(seed_key(seed), "classifier").normal(0, _HEAD_STD, (num_classes, self.d_model))  # (K, D)
        self.classifier.weight.data.copy_(torch.from_numpy(draw.astype(np.float32)))
        self.classifier.bias.data.zero_()
        self._word_table = next(n for n, p in self.named_parameters() if p is words.weight)
        self.train(self.training)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the logits (B, K) of texts.

        Arguments:
            tokens: (B, T) int64.
            mask: (B, T) bool, True at real tokens; padding stands on the right.
        """
        B, T = tokens.shape
        extra = {} if self._own_positions else {"position_ids": torch.arange(T, device=tokens.device).expand(B, T)}
        encoder = self.get_submodule(self._encoder)
        h = encoder(input_ids=tokens, attention_mask=mask.long(), **extra).last_hidden_state  # (B, T, D)
        share = mask.to(h.dtype) / mask.sum(1, keepdim=True).clamp(min=1)  # (B, T)
        return self.classifier((share[:, None] @ h)[:, 0])  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Encoder:
        """Set the mode of this module; the encoder stays in evaluation mode, without dropout."""
        super().train(mode)
        self.get_submodule(self._encoder).eval()
        return self

    @property
    def word_table(self) -> tuple[str, nn.Parameter]:
        """The word embedding (V, D) with its name; it is no part of the body."""
        return self._word_table, self.get_parameter(self._word_table)

    def body_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every parameter but the word embedding, with its name."""
        return ((name, p) for name, p in self.named_parameters() if name != self._word_table)

    def named_linear_targets(self, groups: Sequence[str]) -> list[str]:
        """Return the paths of the encoder's linear modules that adapters go to.

        Arguments:
            groups: "attention", "mlp", or dotted endings of module paths ("self.query").

        Raises:
            DataError: A group that matches no linear module.
        """
        linears = [n for n, m in self.named_modules() if isinstance(m, nn.Linear) and not n.startswith(HEAD)]
        paths = {_with_group(name): name for name in linears}
        chosen = matching_linears(type(self.get_submodule(self._encoder)).__name__, groups, list(paths))
        return [paths[name] for name in chosen]


@dataclass(frozen=True, eq=False)
class EncoderSource:
    """A folder's encoder and tokenizer.

    Arguments:
        model: Of transformers, without a classifier.
        tokenizer: Cuts nothing and pads nothing until told to.
    """

    model: Any
    tokenizer: Tokenizer


def load_encoder(folder: str | Path) -> EncoderSource:
    """Read an encoder folder as `save_pretrained` writes it; nothing is fetched from a network.

    Raises:
        DataError: Missing or broken files, missing weights, or a model that is no encoder.
    """
    path = packaged_model(str(folder)) or Path(folder)
    if not (path / "config.json").is_file():
        raise DataError(f"no encoder at '{folder}'; model.name must be a folder with a config.json, or minilm")
    with quietly(), as_data_error(folder):
        from transformers import AutoModel

        model, report = AutoModel.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, attn_implementation="eager", output_loading_info=True
        )
        tokenizer = _load_tokenizer(path)
    if getattr(model.config, "is_decoder", False) or not _looks_both_ways(model, tokenizer.get_vocab_size()):
        raise DataError(f"'{folder}' is a decoder ({type(model).__name__}); classification takes an encoder")
    if absent := sorted(name for name in report["missing_keys"] if "pooler" not in name):
        raise DataError(f"'{folder}' lacks the weight {absent[0]} ({len(absent)} in all); get the whole model")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return EncoderSource(model.eval(), tokenizer)


def _with_group(name: str) -> str:
    """Mark BERT's feed-forward modules as mlp: their own names, intermediate and output, do not tell."""
    if ".intermediate." in name:
        return name.replace(".intermediate.", ".mlp.intermediate.")
    return name if "attention" in name else name.replace(".output.", ".mlp.output.")


def _load_tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer


@torch.no_grad()
def _looks_both_ways(model: Any, vocabulary_size: int) -> bool:
    """Tell whether the first hidden state depends on the last token; a decoder's does not."""
    pair = torch.tensor([[1, 2, 3], [1, 2, 4]]).remainder(max(vocabulary_size, 1))
    first = model.eval()(input_ids=pair, attention_mask=torch.ones_like(pair)).last_hidden_state[:, 0]  # (2, D)
    return not torch.equal(first[0], first[1])


def _takes_positions(source: Any) -> bool:
    """Tell whether positions 0, 1, ... can be given; RoBERTa's kind counts its own, after the padding's id."""
    import inspect

    embeddings = getattr(source, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids") or hasattr(embeddings, "padding_idx"):
        return False
    return "position_ids" in inspect.signature(source.forward).parameters


def _longest(source: Any) -> int | None:
    longest = getattr(source.config, "max_position_embeddings", None)
    if longest is not None and hasattr(getattr(source, "embeddings", None), "padding_idx"):
        return int(longest) - 1 - int(source.embeddings.padding_idx)
    return None if longest is None else int(longest)
