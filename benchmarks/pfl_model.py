"""fedlm's transformer in pfl's interface: the same shapes, names and arithmetic, in plain PyTorch.

Attention is written out as products, so that this side has what fedlm has. With LoRA the names are those of peft, and
everything else is frozen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.pfl_cells import Cell

ALPHA = 16.0  # LoRA's product is scaled by alpha / rank on both sides


class Transformer(nn.Module):
    """A pre-LayerNorm transformer LM with learned positions, tied embeddings and an output bias.

    Arguments:
        cell: The shapes.
        length: Positions.
        dropout: On the embedded input and each residual branch.
    """

    def __init__(self, cell: Cell, length: int, dropout: float) -> None:
        super().__init__()
        self.input_table = nn.Parameter(torch.empty(cell.vocabulary, cell.d_model))
        self.output_bias = nn.Parameter(torch.empty(cell.vocabulary))
        self.positions = nn.Embedding(length, cell.d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(cell, dropout) for _ in range(cell.num_layers))
        self.norm = nn.LayerNorm(cell.d_model)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not cell.rank or ".lora_" in name)

    def logits(self, inputs: Tensor) -> Tensor:
        """Map token ids (B, T) to scores (B, T, V)."""
        x = F.embedding(inputs, self.input_table) + self.positions.weight[: inputs.shape[1]]  # (B, T, D)
        x = self.dropout(x)  # (B, T, D)
        for block in self.blocks:
            x = block(x)  # (B, T, D)
        return F.linear(self.norm(x), self.input_table, self.output_bias)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy; pfl calls it with each batch (B, T), padding being a target of -100."""
        self.train()
        return F.cross_entropy(self.logits(inputs).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def metrics(self, inputs: Tensor, targets: Tensor) -> dict[str, object]:
        """Return the loss for pfl's evaluation."""
        from pfl.metrics import Weighted  # type: ignore[import-not-found]

        self.eval()
        total = F.cross_entropy(self.logits(inputs).flatten(0, 1), targets.flatten(), reduction="sum").item()
        return {"loss": Weighted(total, int((targets >= 0).sum()))}


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cell: Cell, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(cell.d_model)
        self.attention = Attention(cell)
        self.mlp_norm = nn.LayerNorm(cell.d_model)
        self.mlp = Mlp(cell)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))  # (B, T, D)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Causal self-attention with one product for queries, keys and values."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.num_heads = cell.num_heads
        self.qkv = linear(cell.d_model, 3 * cell.d_model, cell.rank)
        self.output = linear(cell.d_model, cell.d_model, cell.rank)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)  # (B, T, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # three of (B, H, T, D/H)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)  # (T, T)
        scores = (q * (D // self.num_heads) ** -0.5) @ k.transpose(-2, -1)  # (B, H, T, T)
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v  # (B, H, T, D/H)
        return self.output(mixed.transpose(1, 2).reshape(B, T, D))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.up = linear(cell.d_model, cell.d_ff, cell.rank)
        self.down = linear(cell.d_ff, cell.d_model, cell.rank)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


class LoraLinear(nn.Module):
    """W x + b + (alpha / rank) B A x, with peft's names."""

    def __init__(self, d_in: int, d_out: int, rank: int) -> None:
        super().__init__()
        self.scale = ALPHA / rank
        self.base_layer = nn.Linear(d_in, d_out)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(d_in, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, d_out, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        delta = self.lora_B["default"](self.lora_A["default"](x))  # (..., d_out)
        return self.base_layer(x) + self.scale * delta  # type: ignore[no-any-return]


def linear(d_in: int, d_out: int, rank: int) -> nn.Module:
    """Return a linear module, with an adapter if there is a rank."""
    return LoraLinear(d_in, d_out, rank) if rank else nn.Linear(d_in, d_out)
