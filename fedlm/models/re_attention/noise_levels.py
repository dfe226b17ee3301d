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


def probability_of_containing(frequencies: FloatArray, num_tokens: float) -> FloatArray:
    """Return p_i, the probability that an example of `num_tokens` tokens contains word i: 1 - (1 - f_i)^num_tokens.

    Arguments:
        frequencies: Public word frequencies f, (V,), non-negative; they need not sum to one.
        num_tokens: Tokens of a typical example; a public number, like the configured sequence length.

    Returns:
        (V,), under the unigram model: real words come in bursts, so fewer examples contain each of them.
    """
    f = frequencies / frequencies.sum()  # (V,)
    p: FloatArray = -np.expm1(num_tokens * np.log1p(-np.minimum(f, 1 - 1e-12)))
    return p


def example_level_noise(
    rows: float,
    weights: Mapping[str, float],
    *,
    containing: FloatArray,
    batch_size: float,
    kind: str,
) -> NoiseLevels:
    """Return the levels after example-level DP-SGD.

    Arguments:
        rows: Variance that the steps have added to a coordinate of the input table, a sum of `step_variance`, or 0.
        weights: The same of each trained tensor of the body.
        containing: p, probability that an example contains each word, (V,).
        batch_size: Expected examples of a step, B = q n. A row's B p_i is taken as at least one example.
        kind: `absolute`: `rows` for every row. `per_frequency`: `rows / p_i^2`, p_i at least 1 / B.

    Raises:
        DataError: An unknown kind.
    """
    scale = np.ones_like(containing)  # (V,)
    if _is_per_frequency(kind):
        scale = np.clip(containing, 1 / max(1.0, batch_size), 1.0) ** -2
    return NoiseLevels((rows * scale).astype(np.float32), dict(weights))


def user_level_noise(
    step: float, rounds: float, weights: frozenset[str], *, inclusion: FloatArray, kind: str
) -> NoiseLevels:
    """Return the levels of a federated model after server steps with user-level noise on every released row.

    A row is released, noise and all, in a round that has it in its row set: in rounds * pi_i of them in expectation.

    Arguments:
        step: What one server step adds: `step_variance(z C / n, server learning rate, ...)`, n the expected cohort. The
            noise of rounds counts as independent; with blt or banded, where it partly cancels, that overstates it.
        rounds: Server steps so far.
        weights: Trained tensors of the body, released every round.
        inclusion: pi, probability of each row to be in a round's set, (V,); zeros if the tables are frozen.
        kind: `absolute`: rounds pi_i step. `per_frequency`: rounds step / pi_i, the same releases with each divided by
            pi_i, as the paper's sigma / (n pi_i), so that all rows would move at one pace. Rows with pi_i = 0 never
            trained: 0 for both.

    Raises:
        DataError: An unknown kind.
    """
    power = -1 if _is_per_frequency(kind) else 1
    scale = np.power(inclusion, power, out=np.zeros_like(inclusion), where=inclusion > 0)  # (V,)
    return NoiseLevels((rounds * step * scale).astype(np.float32), dict.fromkeys(sorted(weights), rounds * step))


def _is_per_frequency(kind: str) -> bool:
    if kind not in KINDS:
        raise DataError(f"kind = {kind!r} of noise levels is not one of {', '.join(KINDS)}")
    return kind == "per_frequency"
