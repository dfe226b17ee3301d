"""Models from the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from fedlm.errors import ConfigError, DataError
from fedlm.models.lstm import LstmModel
from fedlm.models.transformer import TransformerModel
from fedlm.randomness import seed_key, stream

if TYPE_CHECKING:
    from fedlm.config.schema import Config

FloatArray = npt.NDArray[np.floating[Any]]
OWN_MODELS = ("transformer", "lstm")
# Of words that the public corpus never shows: a finite bias, which training can lift.
_SMALLEST_FREQUENCY = 1e-9


def build_model(config: Config, frequencies: FloatArray, seed: int) -> TransformerModel | LstmModel:
    """Return a model of our own with random weights that starts as the unigram model.

    Arguments:
        config: Its `model` and `data.sequence_length` are read.
        frequencies: Public word frequencies, (V,), non-negative; they need not sum to one.
        seed: The weights are a function of it and of the shapes alone; the global generator is not touched.

    Returns:
        The model; its logits are about the log frequencies, so it is self-normalised (log Z close to 0).

    Raises:
        ConfigError: `model.name` is not one of ours, or the shape is impossible.
        DataError: Frequencies that are not a distribution.
    """
    logs = log_frequencies(frequencies)
    model = empty_model(config, len(logs))
    generator = torch.Generator().manual_seed(int(stream(seed_key(seed), "initial weights").integers(2**63)))
    model.initialise(torch.from_numpy(logs), generator)
    return model


def empty_model(config: Config, vocabulary_size: int) -> TransformerModel | LstmModel:
    """Return a model of our own with uninitialised weights, for a worker that maps them (`set_weights`).

    Its memory is reserved but never touched, so it costs nothing until the views replace it.

    Arguments:
        config: Its `model` and `data.sequence_length` are read.
        vocabulary_size: V.

    Raises:
        ConfigError: `model.name` is not one of ours, or `d_model` is not a multiple of `num_heads`.
    """
    model = config.model
    if model.name == "lstm":
        return LstmModel(
            vocabulary_size,
            d_model=model.d_model,
            d_hidden=model.d_hidden or model.d_model,
            num_layers=model.num_layers,
            dropout=model.dropout,
            tied=model.tied,
        )
    if model.name != "transformer":
        raise ConfigError(f"model.name = '{model.name}' is not one of {', '.join(OWN_MODELS)}; use load_pretrained")
    if model.d_model % model.num_heads:
        raise ConfigError(
            f"model.d_model = {model.d_model} is not a multiple of model.num_heads = {model.num_heads}; "
            "change one of them"
        )
    return TransformerModel(
        vocabulary_size,
        config.data.sequence_length,
        d_model=model.d_model,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        d_ff=model.d_ff or 4 * model.d_model,
        dropout=model.dropout,
        tied=model.tied,
        re_attention=model.re_attention != "off",
    )


def log_frequencies(frequencies: FloatArray) -> FloatArray:
    """Return the log of normalised frequencies, (V,) float32, with a floor for words never seen.

    Raises:
        DataError: Not a vector of finite, non-negative numbers with a positive sum.
    """
    values = np.asarray(frequencies, dtype=np.float64)  # (V,)
    if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise DataError("frequencies must be one vector of finite numbers >= 0, not all 0; check the vocabulary")
    floored = np.maximum(values / values.sum(), _SMALLEST_FREQUENCY)
    logs: FloatArray = np.log(floored / floored.sum()).astype(np.float32)
    return logs
