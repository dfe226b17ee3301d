"""The transformer against an independent numpy program, and its dropout."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_models import LENGTH, VOCABULARY, ModelMaker

from fedlm.errors import DataError
from fedlm.models.weights import weights

erf = np.vectorize(math.erf)


def numpy_hidden(w: dict[str, np.ndarray], tokens: np.ndarray, num_layers: int, num_heads: int) -> np.ndarray:
    """One sequence (T,) -> (T, D), head by head and position by position, in float64."""
    w = {name: array.astype(np.float64) for name, array in w.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["input_table"][tokens] + w["positions.weight"][: len(tokens)]
    width = x.shape[1] // num_heads
    for layer in range(num_layers):
        block = f"blocks.{layer}"
        q, k, v = np.split(linear(norm(x, f"{block}.attention_norm"), f"{block}.attention.qkv"), 3, axis=1)
        mixed = np.zeros_like(x)
        for head in range(num_heads):
            part = slice(head * width, (head + 1) * width)
            for t in range(len(tokens)):
                scores = np.exp(k[: t + 1, part] @ q[t, part] / math.sqrt(width))
                mixed[t, part] = scores @ v[: t + 1, part] / scores.sum()
        x = x + linear(mixed, f"{block}.attention.output")
        up = linear(norm(x, f"{block}.mlp_norm"), f"{block}.mlp.up")
        x = x + linear(up * (1 + erf(up / math.sqrt(2))) / 2, f"{block}.mlp.down")
    return norm(x, "norm")


@pytest.mark.parametrize("length", [1, 12, 64, 65])
def test_hidden_states_equal_an_independent_program(make_model: ModelMaker, length: int) -> None:
    model = make_model("transformer", d_ff=40)
    w = {}
    rng = np.random.default_rng(2)
    for name, array in weights(model).items():  # weights large enough that every part shows
        array += 0.3 * rng.standard_normal(array.shape).astype(np.float32)
        w[name] = array
    tokens = rng.integers(0, VOCABULARY, length)
    found = model.hidden(torch.from_numpy(tokens)[None])[0].detach().numpy()
    np.testing.assert_allclose(found, numpy_hidden(w, tokens, 2, 2), atol=2e-4)


@pytest.mark.parametrize("kind", ["transformer", "gpt2"])
def test_a_sequence_longer_than_the_positions_is_refused(make_model: ModelMaker, kind: str) -> None:
    with pytest.raises(DataError, match=f"{LENGTH + 1} tokens; the model has {LENGTH} positions"):
        make_model(kind).hidden(torch.zeros(1, LENGTH + 1, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["transformer", "lstm"])
def test_dropout_follows_its_own_seed_and_stops_in_evaluation(make_model: ModelMaker, kind: str) -> None:
    tokens = torch.arange(20).view(2, 10)
    model = make_model(kind, dropout=0.4)
    plain = make_model(kind).hidden(tokens)
    torch.testing.assert_close(model.hidden(tokens), plain)
    model.train()
    draws = []
    for seed in (1, 1, 2):
        model.seed_dropout(seed)
        torch.rand(3)  # whatever else the process draws
        draws.append(model.hidden(tokens))
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2], atol=1e-4)
    assert not torch.allclose(draws[0], plain, atol=1e-4)


def test_dropout_keeps_the_mean() -> None:
    from fedlm.models.layers import Dropout

    dropped = Dropout(0.25, torch.Generator().manual_seed(1))(torch.ones(200, 200))
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=0.015)  # five standard deviations
