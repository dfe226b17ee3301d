"""How much DP noise the released weights hold, from public numbers alone: what Re-Attention starts from.

Two readings of "the noise of a row" (`kind`), both offered because they answer different questions:

* `absolute`: the variance of the additive error itself. Dense noise falls on every row at every step, so it is the
  *same* for a frequent and for a rare row: only what trained, for how long and at which rate matters.
* `per_frequency`: the paper's effective error, sigma / (B p_i) for the row of token i (Ding et al. 2024, arXiv
  2405.18194). The sum over a batch holds signal of a row from the B p_i examples alone that contain its token, yet is
  divided by B: the row's signal is p_i times that of a weight which all examples move. Measured against its own
  signal, which is how it counts after an optimiser or a norm that rescales it (Adam, LayerNorm), its noise is 1 / p_i
  times as large. It is a relative error, not what one would measure by noising the row.

The variances are those of the noise that the releases have put into the weights since training began, per coordinate;
the error of the starting weights counts as none.

Privacy: noise multiplier, batch size, learning rate and public frequencies are no function of the private data, so
nothing here costs any.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlm.codec import coded
from fedlm.errors import DataError

FloatArray = npt.NDArray[np.float64]
KINDS = ("absolute", "per_frequency")
ADAM_EPSILON = 1e-8


@coded
@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """The noise in a model's released weights, as the variance of a coordinate.

    Arguments:
        rows: Of each row of the input table, (V,); zeros if the table is frozen.
        weights: Of each trained tensor of the body, by its name in `named_parameters`; all others are frozen: exact.

    Raises:
        DataError: A variance that is negative or not finite.
    """

    rows: npt.NDArray[np.float32]
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        everything = np.append(self.rows, list(self.weights.values()))
        if self.rows.ndim != 1 or not np.isfinite(everything).all() or (everything < 0).any():
            raise DataError("noise levels must be a vector of rows and numbers, finite and >= 0; check their source")


def step_variance(
    noise_std: float, learning_rate: float, *, optimizer: str, adam_epsilon: float = ADAM_EPSILON
) -> float:
    """Return the noise that one step adds to a trained coordinate; the noise of steps is independent, so they add.

    * `sgd`: (lr sigma)^2, exactly.
    * `adam`: (lr sigma / (sigma + epsilon))^2, the noise-dominated limit. The second moment is about sigma^2 + g^2, of
      which the signal g is left out, so it is an upper bound, close wherever DP noise exceeds the mean gradient. Each
      step's noise enters through the first moment with weights that sum to one, so over many steps momentum changes
      nothing.

    Arguments:
        noise_std: sigma, of a coordinate of the released mean gradient: z C / (q n), or z C / n for a cohort of n.
        learning_rate: lr.
        optimizer: `sgd` or `adam`.
        adam_epsilon: Added to the root of Adam's second moment.

    Raises:
        DataError: Another optimiser.
    """
    if optimizer == "sgd":
        return (learning_rate * noise_std) ** 2
    if optimizer == "adam":
        return (learning_rate * noise_std / (noise_std + adam_epsilon)) ** 2 if noise_std else 0.0
    raise DataError(f"the noise of optimizer = {optimizer!r} is not known; use 'sgd' or 'adam'")


def is_per_frequency(kind: str) -> bool:
    if kind not in KINDS:
        raise DataError(f"kind = {kind!r} of noise levels is not one of {', '.join(KINDS)}")
    return kind == "per_frequency"
