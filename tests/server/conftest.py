"""A small but real experiment: chat data, a pretrained base, every kind of block at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedlm.config.load import load_config
from fedlm.config.schema import Config

SMALL = [
    "rounds=4", "vocabulary.size=2000", "model.d_model=32", "model.num_layers=1", "model.num_heads=2",
    "data.sequence_length=16", "data.max_tokens_per_user=120", "data.max_eval_tokens=2000", "pretrain.epochs=1",
    "pretrain.negatives=200", "trainable.bias=true", "trainable.lora.rank=4", "trainable.embedding_rows.count=300",
    "loss.negatives=64", "fleet.cohort=24", "execution.group_size=4", "execution.eval_every=2",
    "execution.checkpoint_every=3", "privacy.epsilon=2", "privacy.reproducible_noise=true",
    "privacy.reproducible_cohorts=true",  # runs are compared bit for bit
]  # fmt: skip


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests: the corpus is parsed and the base trained once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small(cache: Path) -> Callable[..., Config]:
    """Make the small experiment with overrides."""
    return lambda *overrides: load_config(None, [*SMALL, f"data.cache_dir={cache}", *overrides])
