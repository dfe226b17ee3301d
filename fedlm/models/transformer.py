"""A small pre-LayerNorm transformer language model (the GPT-2 layout: Radford et al. 2019, section 2.3).

Every linear module and LayerNorm has a bias, so that bias-only training has something to train, and the three
attention matrices are one linear module, so that a block is four products.
"""

from __future__ import annotations

from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlm.errors import DataError
from fedlm.models.attention import causal_attention
from fedlm.models.base import LanguageModel
from fedlm.models.layers import Dropout, Positions, empty_linear
from fedlm.models.re_attention.attention import Noised, NoiseFlow
from fedlm.models.re_attention.noise_levels import NoiseLevels

_WEIGHT_STD = 0.02


class TransformerModel(LanguageModel):
    """A transformer LM with learned positions, GELU, and an output bias; uninitialised until `initialise`.

    Arguments:
        vocabulary_size: V.
        max_length: Longest sequence, in tokens; the number of positions.
        d_model: Width D, a multiple of `num_heads`.
        num_layers: Blocks.
        num_heads: Attention heads of a block.
        d_ff: Width of the feed-forward layer.
        dropout: Rate on the embedded input and on each residual branch.
        tied: Input and output embedding are one table.
        re_attention: Correct attention for the noise that `noise_levels` says the weights hold; none at first.

    Raises:
        DataError: `d_model` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        vocabulary_size: int,
        max_length: int,
        *,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ff: int,
        dropout: float = 0.0,
        tied: bool = True,
        re_attention: bool = False,
    ) -> None:
        if d_model % num_heads:
            raise DataError(f"model.d_model = {d_model} is not a multiple of model.num_heads = {num_heads}")
        super().__init__(*self.empty_tables(vocabulary_size, d_model, tied=tied))
        self.positions = Positions(max_length, d_model)
        self.dropout = Dropout(dropout, self.dropout_generator)
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, num_heads, d_ff, dropout, self.dropout_generator) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model)
        self.re_attention = re_attention
        self._noise_levels: NoiseLevels | None = None
        self._row_variances: Tensor | None = None

    @property
    def noise_levels(self) -> NoiseLevels | None:
        """The noise of the weights as they are now; None: they are taken as exact, and attention is the usual one."""
        return self._noise_levels

    @noise_levels.setter
    def noise_levels(self, levels: NoiseLevels | None) -> None:
        if levels is not None:
            self._check_levels(levels)
        self._noise_levels = levels
        self._row_variances = None if levels is None else torch.from_numpy(levels.rows)  # (V,)

    def _check_levels(self, levels: NoiseLevels) -> None:
        if not self.re_attention:
            raise DataError("noise levels for a transformer without Re-Attention; set model.re_attention")
        if len(levels.rows) != self.vocabulary_size:
            raise DataError(f"noise levels of {len(levels.rows)} rows; the model has {self.vocabulary_size}")
        known = dict(self.named_parameters())
        for name in levels.weights.keys() - known.keys():
            near = get_close_matches(name, known, n=1)
            raise DataError(
                f"noise level of unknown tensor '{name}'" + (f"; did you mean '{near[0]}'?" if near else "")
            )

    def row_noise(self, tokens: Tensor) -> Tensor | None:
        """Return the noise of the rows of `tokens` (B, T), (B, T), or None; see `LanguageModel`."""
        if self._row_variances is None:
            return None
        self._row_variances = self._row_variances.to(tokens.device)
        return self._row_variances[tokens]

    def body(self, x: Tensor, mask: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Map embedded inputs (B, T, D) to hidden states (B, T, D), T at most `max_length`; see `LanguageModel`.

        Raises:
            DataError: The model has noise levels but `noise` is None: attention would go uncorrected.
        """
        if self._noise_levels is not None:
            return self._corrected_body(x, noise)
        x = self.dropout(self.positions(x))  # (B, T, D)
        for block in self.blocks:
            x = block(x)  # (B, T, D)
        return self.norm(x)  # type: ignore[no-any-return]

    def _corrected_body(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """Do what `body` does, with Re-Attention; `noise` (B, T) is the variance of `x`."""
        assert self._noise_levels is not None
        if noise is None:
            raise DataError("the model has noise levels but body() got none of its input; give row_noise(tokens)")
        levels = self._noise_levels.weights
        flow = NoiseFlow({id(p): levels[name] for name, p in self.named_parameters() if name in levels})
        variance = noise[..., None].to(x.dtype) + flow.of(self.positions.weight)  # (B, T, 1)
        stream = Noised(self.dropout(self.positions(x)), variance.expand_as(x))  # (B, T, D)
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            stream = block.noised(stream, flow)  # (B, T, D)
        return self.norm(stream.mean)  # type: ignore[no-any-return]

    @torch.no_grad()
    def initialise(self, log_frequencies: Tensor, generator: torch.Generator) -> None:
        """Draw all weights: GPT-2's scales, with smaller rows so that it starts as the unigram model.

        The residual stream still holds the input row, so rows of GPT-2's 0.02 would start a tied model
        predicting repetitions (a logit of about 0.01 D). Rows and positions of 0.5/D keep that logit under 0.5;
        the first LayerNorm undoes the scale, and a smaller final gain, the other remedy, slowed training.

        Arguments:
            log_frequencies: The output bias, (V,).
            generator: The only source of randomness.
        """
        row_std = 0.5 / self.d_model
        self.initialise_tables(log_frequencies, row_std, generator)
        nn.init.normal_(self.positions.weight, std=row_std, generator=generator)
        branch_std = _WEIGHT_STD / (2 * len(self.blocks)) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                into_residual = name.endswith((".output", ".down"))
                nn.init.normal_(module.weight, std=branch_std if into_residual else _WEIGHT_STD, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()


class TransformerBlock(nn.Module):
    """One pre-LayerNorm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, num_heads)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = Mlp(d_model, d_ff)
        self.dropout = Dropout(dropout, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))  # (B, T, D)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]

    def noised(self, x: Noised, flow: NoiseFlow) -> Noised:
        """Do what `forward` does with Re-Attention, and carry the variances along."""
        for norm, branch in ((self.attention_norm, self.attention), (self.mlp_norm, self.mlp)):
            y = branch.noised(flow.layer_norm(norm, x), flow)  # (B, T, D)
            x = Noised(x.mean + self.dropout(y.mean), x.variance + y.variance)
        return x


class Attention(nn.Module):
    """Causal multi-head self-attention with one product for queries, keys and values."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = empty_linear(d_model, 3 * d_model)
        self.output = empty_linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.output(causal_attention(self.qkv(x), self.num_heads))  # type: ignore[no-any-return]

    def noised(self, x: Noised, flow: NoiseFlow) -> Noised:
        """Do what `forward` does with Re-Attention, and carry the variances along."""
        return flow.linear(self.output, flow.attention(flow.linear(self.qkv, x), self.num_heads))


class Mlp(nn.Module):
    """The feed-forward layer: down(gelu(up(x)))."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = empty_linear(d_model, d_ff)
        self.down = empty_linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]

    def noised(self, x: Noised, flow: NoiseFlow) -> Noised:
        """Do what `forward` does, and carry the variances along."""
        return flow.linear(self.down, flow.gelu(flow.linear(self.up, x)))
