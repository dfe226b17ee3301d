"""Paths become absolute; words that mean something stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlm.config.load import load_config
from fedlm.config.paths import with_absolute_paths


def test_paths_become_absolute_and_words_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("users.jsonl", "pretrain", "chitchat", "transformer"):
        (tmp_path / name).touch()
    config = with_absolute_paths(load_config(None, ["data.corpus=users.jsonl", "data.cache_dir=cache"]))
    assert config.data.corpus == str(tmp_path / "users.jsonl")
    assert config.data.cache_dir == str(tmp_path / "cache")
    assert (config.model.name, config.model.base, config.trainable.lora.adapter) == ("transformer", "pretrain", "")
    plain = load_config(None, [])
    assert with_absolute_paths(plain) == plain
    assert with_absolute_paths(config) == config
