"""The corpus named in the configuration is found, and its fingerprint changes exactly with its content."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fedlm.config.schema import Config, DataConfig, SyntheticConfig
from fedlm.data.corpora import UserTexts, fingerprint, read_users
from fedlm.errors import ConfigError, DataError

PLUG_IN = """
from fedlm.data.corpora import UserTexts

def letters(config):
    for n in range(config.seed):
        yield UserTexts(f"user {n}", TEXTS, "train")

def wrong(config):
    yield "hello"
"""


def config_for(corpus: str, **data: object) -> Config:
    return Config(data=DataConfig(corpus=corpus, **data))  # type: ignore[arg-type]


def write_plug_in(folder: Path, name: str, texts: list[str]) -> None:
    (folder / f"{name}.py").write_text(f"TEXTS = {texts!r}\n{PLUG_IN}", encoding="utf-8")


def test_a_plug_in_gets_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plug_in(tmp_path, "corpus_plug_in", ["hello"])
    monkeypatch.syspath_prepend(tmp_path)
    config = replace(config_for("corpus_plug_in:letters"), seed=2)
    assert list(read_users(config)) == [UserTexts(f"user {n}", ["hello"], "train") for n in range(2)]
    with pytest.raises(DataError, match="yielded str; it must yield UserTexts"):
        list(read_users(config_for("corpus_plug_in:wrong")))
    with pytest.raises(ConfigError, match="has no attribute 'missing'"):
        list(read_users(config_for("corpus_plug_in:missing")))
    with pytest.raises(ConfigError, match=r"No module named 'no_such_module'.*PYTHONPATH"):
        list(read_users(config_for("no_such_module:letters")))


def test_a_plug_in_fingerprint_is_of_its_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    prints = []
    for name, texts in [("fp_one", ["ab", "c"]), ("fp_same", ["ab", "c"]), ("fp_moved", ["a", "bc"])]:
        write_plug_in(tmp_path, name, texts)
        prints.append(fingerprint(config_for(f"{name}:letters")))
    assert prints[0] == prints[1] != prints[2]


def test_a_file_fingerprint_is_of_its_bytes(tmp_path: Path) -> None:
    path, copy = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_text(json.dumps({"user": "u", "texts": ["x"]}), encoding="utf-8")
    shutil.copy(path, copy)
    before = fingerprint(config_for(str(path)))
    assert before == fingerprint(config_for(str(copy)))
    path.write_text(json.dumps({"user": "u", "texts": ["y"]}), encoding="utf-8")
    assert before != fingerprint(config_for(str(path)))


def test_the_synthetic_fingerprint_has_its_settings_and_the_seed() -> None:
    base = config_for("synthetic")
    others = [replace(base, seed=2), replace(base, synthetic=SyntheticConfig(persistence=0.5))]
    assert len({fingerprint(config) for config in [base, *others]}) == 3
    assert fingerprint(base) == fingerprint(replace(base, rounds=7))


@pytest.mark.skipif(importlib.util.find_spec("flwr_datasets") is not None, reason="the hf extra is installed")
def test_hugging_face_names_the_missing_extra() -> None:
    with pytest.raises(DataError, match=r"pip install 'fedlm\[hf\]'"):
        list(read_users(config_for("hf:some/chat")))


def test_hugging_face_options_are_checked() -> None:
    with pytest.raises(DataError, match="unknown option 'autor'"):
        list(read_users(config_for("hf:some/chat?autor=name")))


def test_a_missing_file_says_what_a_corpus_can_be() -> None:
    with pytest.raises(DataError, match=r"no corpus 'nowhere\.jsonl': no such file; data\.corpus is chitchat"):
        list(read_users(config_for("nowhere.jsonl")))


def test_the_synthetic_corpus_has_no_text() -> None:
    with pytest.raises(DataError, match="build_store"):
        read_users(config_for("synthetic"))
