"""Models from the configuration: determinism, and the start as the unigram model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import ModelMaker

from fedlm.config.schema import Config, ModelConfig
from fedlm.errors import ConfigError, DataError
from fedlm.models.factory import build_model, empty_model, log_frequencies
from fedlm.models.weights import weights

OWN = ["transformer", "lstm"]


@pytest.mark.parametrize("kind", OWN)
def test_weights_are_a_function_of_the_seed_alone(make_model: ModelMaker, kind: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = weights(make_model(kind, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = weights(make_model(kind, seed=3)), weights(make_model(kind, seed=4))
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
    assert not np.allclose(first["input_table"], other["input_table"])


@pytest.mark.parametrize("kind", OWN)
def test_every_weight_is_initialised(make_model: ModelMaker, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: torch_empty(*a, **k).fill_(torch.nan))
    for name, array in weights(make_model(kind, tied=False)).items():
        assert np.isfinite(array).all(), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", OWN)
def test_the_untrained_model_is_the_unigram_model(kind: str, tied: bool) -> None:
    size = 5000
    zipf = 1 / np.arange(1, size + 1)
    config = Config(model=ModelConfig(name=kind, d_model=128, tied=tied))
    model = build_model(config, zipf, 1)
    log_p = np.log(zipf / zipf.sum())
    tokens = torch.from_numpy(np.random.default_rng(1).choice(size, (64, 32), p=np.exp(log_p)))
    with torch.no_grad():
        logits = model.hidden(tokens[:, :-1]) @ model.output_table.T + model.output_bias  # (B, T, V)
    log_z = logits.logsumexp(-1)
    assert log_z.abs().max() < 0.05
    cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    unigram = -log_p[tokens[:, 1:]].mean()
    assert cross_entropy == pytest.approx(unigram, abs=0.02)


def test_words_never_seen_get_a_finite_bias() -> None:
    logs = log_frequencies(np.array([3, 1, 0]))
    np.testing.assert_allclose(logs, np.log([0.75, 0.25, 1e-9]), rtol=1e-6)


@pytest.mark.parametrize("bad", [[], [0.0, 0.0], [1.0, -0.1], [1.0, np.nan], [1.0, np.inf], [[1.0]]])
def test_frequencies_that_are_none_are_refused(bad: list[float]) -> None:
    with pytest.raises(DataError, match="frequencies must be"):
        log_frequencies(np.array(bad))


def test_configurations_that_are_no_model_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.d_model = 30 is not a multiple of model\.num_heads = 4"):
        empty_model(Config(model=ModelConfig(d_model=30, num_heads=4)), 10)
    with pytest.raises(ConfigError, match=r"model\.name = 'gru'"):
        empty_model(Config(model=ModelConfig(name="gru")), 10)
