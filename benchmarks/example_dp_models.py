"""The models of the example-level DP comparison, their batch and losses; torch and transformers alone.

The stock modules of transformers, so that every side sees the same ones: a RoBERTa-like classifier of two classes and
a GPT-2-like language model whose input and output embedding are one table. Weights are random, dropout is 0.

Legend: B examples, T tokens, V vocabulary, R LoRA rank.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

CLIP_NORM = 0.1
RANK, ALPHA = 8, 16
TABLE = "transformer.wte.weight"  # of the language model, tied
_FIRST_POSITION = 2  # RoBERTa counts positions from its padding id + 1
_LORA_TARGETS = {
    "classifier": ["query", "key", "value", "dense"],
    "lm": ["c_attn", "c_proj", "c_fc"],
}


@dataclass(frozen=True)
class Sizes:
    """What a model and its batch measure.

    Arguments:
        vocabulary: V.
        width: D.
        num_layers: Transformer blocks.
        num_heads: Attention heads.
        width_ff: Feed-forward width.
        num_examples: B.
    """

    vocabulary: int
    width: int = 256
    num_layers: int = 4
    num_heads: int = 4
    width_ff: int = 1024
    num_examples: int = 8


MODELS = {"classifier": Sizes(8192), "lm": Sizes(50_257)}


@dataclass(frozen=True)
class Inputs:
    """One physical batch without padding.

    Arguments:
        tokens: (B, T).
        positions: (B, T); for each example, because a broadcast (1, T) breaks hooks that look at single examples.
        targets: (B,) classes, or (B, T) next tokens.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor

    def select(self, examples: slice) -> Inputs:
        """Return some of the examples."""
        return Inputs(self.tokens[examples], self.positions[examples], self.targets[examples])


def build(kind: str, sizes: Sizes, length: int) -> nn.Module:
    """Return a model with its random weights, in training mode, which hooks of peers insist on.

    Arguments:
        kind: A key of MODELS.
        sizes: Its sizes.
        length: T, the longest sequence.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = _roberta(sizes, length) if kind == "classifier" else _gpt2(sizes, length)
    model.tie_weights()
    fill(dict(model.named_parameters()))
    stock: nn.Module = model.train()
    return stock


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor]) -> None:
    """Give every tensor random values that depend on its name alone; scales of norms lie around 1."""
    for name, tensor in tensors.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        is_scale = name.endswith("weight") and tensor.dim() == 1
        tensor.normal_(mean=float(is_scale), std=0.02, generator=generator)


def choose(model: nn.Module, kind: str, scope: str) -> dict[str, nn.Parameter]:
    """Mark what trains, and return it by name.

    Arguments:
        model: What `build` returned; for "lora" it gets adapters.
        kind: Its kind.
        scope: "full", "body" (all but the language model's table), "bias" (every parameter whose name ends so) or
            "lora".
    """
    if scope == "lora":
        _add_lora(model, kind)
    wanted = {"full": "", "body": "", "bias": "bias", "lora": ".default.weight"}[scope]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(wanted) and not (scope == "body" and name == TABLE))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def batch(kind: str, sizes: Sizes, length: int, num_examples: int | None = None) -> Inputs:
    """Return a batch of words by a Zipf law, so that they repeat as in text.

    Arguments:
        kind: A key of MODELS.
        sizes: Sizes of the model.
        length: T.
        num_examples: B; None for the size's own.
    """
    generator = torch.Generator().manual_seed(length)
    B = num_examples or sizes.num_examples
    first = _FIRST_POSITION  # ids below it are special ones of RoBERTa
    ranks = torch.arange(1, sizes.vocabulary - first + 1, dtype=torch.float64)
    words = torch.multinomial(1 / ranks, B * (length + 1), replacement=True, generator=generator) + first
    words = words.view(B, length + 1)
    offset = first if kind == "classifier" else 0
    positions = torch.arange(offset, length + offset).expand(B, length).contiguous()  # (B, T)
    targets = torch.arange(B) % 2 if kind == "classifier" else words[:, 1:].contiguous()
    return Inputs(words[:, :-1].contiguous(), positions, targets)


def losses(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return each example's loss (B,): cross-entropy of its class, or the mean over its own next tokens."""
    options = {} if inputs.targets.dim() == 2 else {"token_type_ids": torch.zeros_like(inputs.tokens)}
    logits: Tensor = model(input_ids=inputs.tokens, position_ids=inputs.positions, **options).logits
    if inputs.targets.dim() == 1:
        return cross_entropy(logits, inputs.targets, reduction="none")
    per_token = cross_entropy(logits.flatten(0, 1), inputs.targets.flatten(), reduction="none")  # (B T,)
    return per_token.view(inputs.targets.shape).mean(1)


def one_at_a_time(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], inputs: Inputs, stability: float = 0.0
) -> dict[str, Tensor]:
    """Return the clipped sum by definition: each example's gradient alone, by autograd.

    Arguments:
        model: The stock model.
        parameters: What trains, by name.
        inputs: The batch.
        stability: Added to each norm; Opacus has 1e-6.
    """
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for i in range(len(inputs.tokens)):
        (loss,) = losses(model, inputs.select(slice(i, i + 1)))
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        found = {name: g for name, g in zip(sums, gradients, strict=True) if g is not None}
        factor = min(1.0, CLIP_NORM / (joint_norm(found) + stability))
        for name, gradient in found.items():
            sums[name].add_(gradient, alpha=factor)
    return sums


def joint_norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of all tensors together."""
    return math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in tensors.values()))


def _roberta(sizes: Sizes, length: int) -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config: Any = RobertaConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.width, num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads, intermediate_size=sizes.width_ff, type_vocab_size=1,
        max_position_embeddings=length + _FIRST_POSITION, pad_token_id=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 2
    return RobertaForSequenceClassification(config)


def _gpt2(sizes: Sizes, length: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=sizes.vocabulary, n_embd=sizes.width, n_layer=sizes.num_layers, n_head=sizes.num_heads,
        n_inner=sizes.width_ff, n_positions=length, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _add_lora(model: nn.Module, kind: str) -> None:
    import peft

    targets = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in _LORA_TARGETS[kind]]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, fan_in_fan_out=kind == "lm",
        target_modules=[name for name in targets if not name.startswith("classifier")],
    )  # fmt: skip
    peft.inject_adapter_in_model(config, model)
    fill({name: parameter for name, parameter in model.named_parameters() if ".lora_" in name})
