"""Evaluation: always the exact full softmax, whatever the training loss.

Perplexity is per token of the vocabulary; bits per byte divides by the UTF-8 bytes of the text scored and so compares
across vocabularies (an unknown word costs only its <unk> token, so compare at equal out-of-vocabulary rates). Under
NCE, E[log Z] and its spread tell how far the scores are from normalising themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import add

import torch
from torch import Tensor

from fedlm.losses.full_softmax import log_normaliser, target_scores


@dataclass(frozen=True)
class Score:
    """Sums over scored tokens; `+` combines parts.

    Arguments:
        nll: Sum of negative log likelihoods in nats.
        num_tokens: Tokens scored.
        num_bytes: UTF-8 bytes of their text.
        log_z: Sum of log Z.
        log_z_squared: Sum of its square.
        metrics: Sums of further numbers (`fedlm.losses.metrics`), as many in every part; none in an empty score.
    """

    nll: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0
    log_z: float = 0.0
    log_z_squared: float = 0.0
    metrics: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Make a tuple of what a message had as a list."""
        object.__setattr__(self, "metrics", tuple(self.metrics))

    def __add__(self, other: Score) -> Score:
        return Score(
            self.nll + other.nll,
            self.num_tokens + other.num_tokens,
            self.num_bytes + other.num_bytes,
            self.log_z + other.log_z,
            self.log_z_squared + other.log_z_squared,
            tuple(map(add, self.metrics, other.metrics))
            if self.metrics and other.metrics
            else self.metrics or other.metrics,
        )

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood of a token."""
        return math.exp(min(self.nll / self.num_tokens, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits needed for one byte of the text."""
        return self.nll / math.log(2) / self.num_bytes

    @property
    def log_z_mean(self) -> float:
        """Mean log Z; zero for a self-normalised model."""
        return self.log_z / self.num_tokens

    @property
    def log_z_std(self) -> float:
        """Standard deviation of log Z over tokens."""
        return math.sqrt(max(self.log_z_squared / self.num_tokens - self.log_z_mean**2, 0.0))


@torch.no_grad()
def score(
    hidden: Tensor,
    targets: Tensor,
    table: Tensor,
    bias: Tensor | None,
    *,
    num_bytes: int,
    chunk: int,
    further: Callable[[Tensor], tuple[float, ...]] = lambda nll: (),
) -> Score:
    """Score tokens exactly.

    Edge cases: a diverged model's figures that are not finite count as the largest number of fp32, so a score always
    is a number.

    Arguments:
        hidden: (N, D) final hidden states of real tokens.
        targets: (N,) word ids.
        table: (V, D) output embedding.
        bias: (V,) or None.
        num_bytes: UTF-8 bytes of the text that these tokens stand for.
        chunk: Vocabulary entries at a time.
        further: Returns `Score.metrics` of these tokens, given the negative log likelihood of each (N,).
    """
    log_z = log_normaliser(hidden, table, bias, chunk)  # (N,)
    nll = _finite(log_z - target_scores(hidden, targets, table, bias)).double()
    log_z = _finite(log_z).double()
    return Score(
        nll=float(nll.sum()),
        num_tokens=len(targets),
        num_bytes=num_bytes,
        log_z=float(log_z.sum()),
        log_z_squared=float((log_z**2).sum()),
        metrics=further(nll),
    )


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, torch.finfo(values.dtype).max)
