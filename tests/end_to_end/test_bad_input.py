"""What a new user gets wrong: one clear line, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import lzma
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_fedlm import Fedlm, one_line

USERS = "".join(json.dumps({"user": str(i), "texts": ["hello you all"] * 3}) + "\n" for i in range(60))

PLUG_IN = """
from fedlm.data.users import UserTexts

number = 3

def users(config):
    for index in range(60):
        yield UserTexts(f"u{index}", ["hello there my friend how are you today"] * 5)

def nothing(config):
    return None

def strings(config):
    yield "text"
"""


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("none.jsonl", None, ["no such file", "data.corpus is"]),
        ("empty.txt", b"", ["is empty: 0 users", "check data.corpus"]),
        ("users.jsonl", b'{"user": "a", "texts": []}\n', ["is empty: 1 users and no text"]),
        ("users.jsonl", b'{"user": "a", "texts": ["x"]}\n{oops\n', ["line 2", "not JSON"]),
        ("users.jsonl", b'{"name": "a", "texts": ["x"]}\n', ["line 1", "'user' is None"]),
        ("users.jsonl", b'{"user": "a", "texts": ["x"], "split": "odd"}\n', ["'odd'", "allowed are train"]),
        ("users.jsonl", b'{"user": "a", "texts": ["x"]}\n' * 2, ["'a' occurs twice"]),
        ("users.jsonl", b'{"user": "a", "texts": ["x"], "split": "test"}\n', ["no training user"]),
        ("users.jsonl.xz", b"not xz", ["damaged xz data", "fetch the file again"]),
        ("users.jsonl.xz", lzma.compress(USERS.encode())[:-20], ["damaged xz data"]),
        ("text.txt", b"caf\xe9", ["not UTF-8", "convert the file"]),
    ],
)
def test_a_bad_corpus(here: Fedlm, tmp_path: Path, name: str, content: bytes | None, parts: list[str]) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = here(f"data.corpus={name}", f"data.cache_dir={tmp_path / 'cache'}")
    one_line(done, 2, *parts)
    assert not done.folder.exists()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.corpus=.", ["no corpus '/", "no such file"]),
        ("data.corpuss=x", ["unknown key 'data.corpuss'", "did you mean 'data.corpus'?"]),
        ("rounds=many", ['rounds = "many"', "a whole number >= 1"]),
        ("vocabulary.size=1000000", ["vocabulary.size = 1,000,000", "321,219"]),
        ("fleet.devices=20_000_000", ["fleet.devices = 20000000", "from 0 to 10_000_000"]),
        ("fleet.profile=/no/file", ["/no/file"]),
        ("fleet.cohort=5000", ["fleet.cohort = 5000"]),
        ("pretrain.corpus=/no/file", ["/no/file"]),
        ("model.base=/no/base", ["model.base = '/no/base'"]),
        ("strategy.kind=fedavgg", ["strategy.kind = 'fedavgg' is unknown", "did you mean 'fedavg'?"]),
        ("strategy.kind=no_such_module:Kind", ["cannot be imported", "PYTHONPATH"]),
        ("data.corpus=no_such_module:users", ["No module named 'no_such_module'"]),
    ],
)
def test_a_bad_setting(here: Fedlm, override: str, parts: list[str]) -> None:
    done = here(override)
    one_line(done, 2, *parts)
    assert not done.folder.exists()


@pytest.mark.skipif(find_spec("flwr_datasets") is not None, reason="the extra 'hf' is installed")
def test_an_extra_that_is_not_installed_is_named(here: Fedlm) -> None:
    one_line(here("data.corpus=hf:some/set"), 2, "pip install 'fedlm[hf]'")


def test_a_corpus_plug_in(here: Fedlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_corpus.py").write_text(PLUG_IN)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("nothing", "number"):
        one_line(here(f"data.corpus=my_own_corpus:{name}"), 2, "is no function that yields UserTexts")
    one_line(here("data.corpus=my_own_corpus:strings"), 2, "yielded str")
    done = here("data.corpus=my_own_corpus:users", "fleet.cohort=10", "privacy.enabled=false")
    assert done.summary["perplexity"] < done.summary["perplexity_initial"]  # everybody says the same


def test_a_machine_that_cannot_start_ray_in_time_is_told_what_to_do(fedlm: Fedlm, tiny: Path) -> None:
    words = ["--set", "execution.grid=ray", "--set", "execution.start_timeout_s=0.001", "--set", "execution.workers=1"]
    done = fedlm("simulate", tiny, "--quiet", "--out", "run", *words)
    one_line(
        done, 1, "Ray on this machine did not start", "execution.start_timeout_s = 0.001 s", "busy", "Raise the limit"
    )
