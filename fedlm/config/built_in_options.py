"""The options of the built-in classes that a config names, without the classes, so that a config loads at once.

Each is the `Options` of its class; `fedlm.registry` says which.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedlm.config.schema import option


@dataclass(frozen=True)
class FedAdamOptions:
    """Of `strategy.kind = "fedadam"`."""

    beta1: float = option(0.9, "first moment", low=0, high=0.9999)
    beta2: float = option(0.99, "second moment", low=0, high=0.99999)
    epsilon: float = option(1e-4, "added to the root of the second moment", above=0)


@dataclass(frozen=True)
class BandedOptions:
    """Of `privacy.mechanism = "banded"`."""

    bands: int = option(0, "bands of the matrix; 0: the best number", low=0)


@dataclass(frozen=True)
class BltOptions:
    """Of `privacy.mechanism = "blt"`."""

    buffers: int = option(2, "buffers", low=1, high=4)


@dataclass(frozen=True)
class SkellamOptions:
    """Of `privacy.mechanism = "skellam"`."""

    grid_bits: int = option(16, "the clip norm is 2^this steps", low=4, high=18)
    min_survivors: int = option(0, "least devices whose sum the server is shown; 0: a third of the cohort", low=0)


@dataclass(frozen=True)
class PowerOptions:
    """Of `trainable.embedding_rows.sampler = "power"`."""

    alpha: float = option(0.5, "inclusion probability ~ frequency^alpha", low=0, high=2)


@dataclass(frozen=True)
class DpAdafestOptions:
    """Of `trainable.embedding_rows.sampler = "dp_adafest"`."""

    alpha: float = option(0.5, "inclusion probability ~ frequency^alpha, until rows are chosen", low=0, high=2)
    selection_rounds: int = option(5, "rounds that ask for the words", low=1)
    selection_share: float = option(0.33, "part of the clip norm that the map gets there", above=0, high=0.6)
    selection_threshold: float = option(3.0, "least score of a row, in standard deviations of noise", low=0)


@dataclass(frozen=True)
class TrainLossOptions:
    """Of the DP metric `train_loss`."""

    bound: float = option(20.0, "larger training losses are reported as this", above=0)


@dataclass(frozen=True)
class NumTokensOptions:
    """Of the DP metric `num_tokens`."""

    bound: float = option(2_000.0, "larger token counts are reported as this", above=0)
