"""A federated run with Re-Attention: nodes know the user-level noise of what they hold, and compute with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tiny_private_runs import TINY, final, lines, quiet

from clients.host import DeviceHost
from fedlm.config.load import load_config
from fedlm.models.transformer import TransformerModel
from fedlm.trainable.build import build_trainable
from fedlm.training.user_level_noise import released_noise
from simulations.run import simulate

SETTINGS = (
    *TINY, "data.corpus=synthetic", "synthetic.users=30", "synthetic.tokens_per_user=40", "synthetic.classes=16",
    "vocabulary.size=300", "loss.negatives=32", "pretrain.negatives=64", "pretrain.epochs=1", "execution.products=fp32",
    "privacy.reproducible_noise=true",
)  # fmt: skip


def test_the_noise_of_rounds_reaches_attention_and_changes_the_run(tmp_path: Path) -> None:
    perplexity = {}
    for kind in ("off", "absolute"):
        run = tmp_path / kind
        simulate(load_config(None, [*SETTINGS, f"model.re_attention={kind}"]), run, quiet)
        perplexity[kind] = [line["perplexity"] for line in lines(run, "metrics.jsonl") if line["perplexity"]]
    assert perplexity["off"][0] == perplexity["absolute"][0]  # before any noise it is the same model
    assert perplexity["off"][-1] != perplexity["absolute"][-1]
    assert all(np.isfinite(array).all() for array in final(tmp_path / "absolute").values())


def test_levels_are_those_of_the_rounds_done_and_follow_the_rows_inclusion() -> None:
    config = load_config(None, [*SETTINGS, "model.re_attention=absolute", "strategy.kind=fedavg"])
    host = DeviceHost(config)
    trainable = build_trainable(host._experiment.model(), config)
    frequencies = host._experiment.vocabulary.frequencies
    found = released_noise(config, trainable, frequencies, noise_std=0.5, rounds=4)
    assert isinstance(trainable.model, TransformerModel)
    step = (config.strategy.learning_rate * 0.5) ** 2
    assert set(found.weights) == set(trainable.parameters)
    np.testing.assert_allclose(list(found.weights.values()), 4 * step)
    np.testing.assert_allclose(found.rows.sum(), 4 * step * config.trainable.embedding_rows.count, rtol=1e-5)
    assert found.rows[5] > found.rows[-1] > 0
