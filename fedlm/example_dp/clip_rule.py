"""The factor that bounds an example's gradient: flat, or automatic clipping (Bu et al. 2023, arXiv 2206.07136).

    flat:       f_i = min(1, C / ((1 + slack) n_i))
    automatic:  f_i = C / ((1 + slack) (n_i + 0.01))

The paper's automatic clipping is `1 / (n_i + 0.01)` with C left to the learning rate; here C scales it, so that the
sensitivity is C for both kinds.

Legend: B examples; n_i the L2 norm of example i's gradient over all that trains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlm.errors import ConfigError

KINDS = ("flat", "automatic")
STABILITY = 0.01  # the paper's gamma, in units of the gradient's norm
SLACK = 1e-3


@dataclass(frozen=True)
class ClipRule:
    """How long an example's gradient may be.

    Guarantee: with the norms that the engines compute, `factor_i * true norm_i <= clip_norm`, in float32 too. A ghost
    norm in float32 is off by less than `SLACK`, relative: where cancellation could make it worse, `layers/matrix.py`
    does not use it. The slack also covers the rounding of the sum of the squares and of the factors.

    Edge cases: norm 0: factor 1 (flat), finite (automatic). Norm inf or nan: factor 0. `clip_norm` inf: no bound,
    factor 1, for runs that are not private.

    Arguments:
        kind: "flat": longer gradients are scaled down; "automatic": all are scaled to nearly `clip_norm`.
        clip_norm: C, above 0.

    Raises:
        ConfigError: Another kind, or a bound out of range.
    """

    kind: str
    clip_norm: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"clipping = {self.kind!r} is not one of {', '.join(KINDS)}")
        if not self.clip_norm > 0:
            raise ConfigError(f"clip_norm = {self.clip_norm} must be above 0")
        if self.kind == "automatic" and math.isinf(self.clip_norm):
            raise ConfigError("automatic clipping needs a finite clip_norm; give one, or use clipping = 'flat'")

    def factors(self, norms: Tensor) -> Tensor:
        """Return each example's factor, (B,), of the type of `norms`.

        Arguments:
            norms: (B,), non-negative.
        """
        bound = self.clip_norm / (1 + SLACK)
        factors = bound / (norms + STABILITY) if self.kind == "automatic" else (bound / norms).clamp(max=1)  # (B,)
        return torch.where(torch.isfinite(norms), factors, torch.zeros_like(norms))


def accepted(factors: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return factors and tensors (B, ...) without the examples whose factor is 0.

    An example with a gradient that is not finite has factor 0, but 0 * nan is nan: it must not be multiplied at all.
    """
    if bool((factors != 0).all()):
        return factors, *tensors
    chosen = factors.nonzero().flatten()  # (B',)
    return factors[chosen], *(tensor[chosen] for tensor in tensors)
