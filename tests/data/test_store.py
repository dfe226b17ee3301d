"""A store holds exactly the kept tokens and bytes of every user, once, whoever builds it."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlm.config.schema import Config, DataConfig, VocabularyConfig
from fedlm.data.store import TokenStore, build_store, cache_folder
from fedlm.data.store_writer import USERS
from fedlm.data.vocabulary import Vocabulary
from fedlm.data.vocabulary_source import load_vocabulary
from fedlm.errors import DataError, FedlmError, OutputError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Config(vocabulary=VocabularyConfig(size=2_000))


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return load_vocabulary(CONFIG)


def write_users(path: Path, users: Sequence[tuple[str, Sequence[str], str]]) -> None:
    lines = [json.dumps({"user": user, "texts": texts, "split": split}) for user, texts, split in users]
    path.write_text("\n".join(lines), encoding="utf-8")


def config_for(folder: Path, **data: object) -> Config:
    settings = {"corpus": str(folder / "users.jsonl"), "cache_dir": str(folder / "cache"), **data}
    return replace(CONFIG, data=DataConfig(**settings))  # type: ignore[arg-type]


ANN_AND_BOB = [("ann", ["the cat", "sat"], "train"), ("bob", ["hello"], "test")]


def plain_stream(texts: Sequence[str], vocabulary: Vocabulary, max_tokens: int) -> tuple[list[int], int]:
    """The definition, a token at a time, with the bytes of the text that each token completes."""
    stream = [(vocabulary.boundary_id, 0)]
    for text in texts:
        ids = vocabulary.encode(text).tolist()
        ends = [vocabulary.encode_with_bytes(text, n + 1)[1] for n in range(len(ids))]
        stream += zip(ids, np.diff([0, *ends]).tolist(), strict=True)
        stream += [(vocabulary.boundary_id, 1)] if ids else []
    kept = stream[:max_tokens] if len(stream) > 1 else []
    return [token for token, _ in kept], sum(num_bytes for _, num_bytes in kept)


@given(
    texts=st.lists(
        st.lists(st.sampled_from(["the cat", "naïve  café! ", " ", "", "it's “ok”"]), max_size=4), max_size=4
    ),
    max_tokens=st.integers(2, 20),
)
def test_streams_and_bytes_are_those_of_the_definition(
    tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary, texts: list[list[str]], max_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("store")
    users = [(f"user {n}", messages, "train") for n, messages in enumerate(texts)]
    users += [("learner", ["yes"], "train"), ("judge", ["no"], "test")]
    write_users(folder / "users.jsonl", users)
    store = build_store(config_for(folder, max_tokens_per_user=max_tokens), vocabulary)
    expected = {user: plain_stream(messages, vocabulary, max_tokens) for user, messages, _ in users}
    expected = {user: kept for user, kept in expected.items() if kept[0]}
    lines = (store.folder / USERS).read_text(encoding="ascii").splitlines()
    assert [json.loads(line) for line in lines] == list(expected)
    assert store.meta["users_without_text"] == len(users) - len(expected)
    for number, (tokens, num_bytes) in enumerate(expected.values()):
        assert store.tokens(number).tolist() == tokens
        assert store.num_tokens[number] == len(tokens)
        assert store.num_bytes[number] == num_bytes


def test_every_user_is_in_exactly_one_split(tmp_path: Path, vocabulary: Vocabulary) -> None:
    own = ["train"] * 40 + ["dev"] * 5 + ["test"] * 5 + [""] * 50
    write_users(tmp_path / "users.jsonl", [(f"user {n}", ["hi"], split) for n, split in enumerate(own)])
    store = build_store(config_for(tmp_path), vocabulary)
    parts = [store.users(split) for split in ("train", "public", "eval")]
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    assert all(len(part) for part in parts)
    assert set(range(40, 50)) <= set(parts[2].tolist())
    assert not set(range(40)) & set(parts[2].tolist())
    assert store.meta["users"] == dict(zip(("train", "public", "eval"), map(len, parts), strict=True))


def test_a_store_pickles_as_its_folder_and_its_tokens_are_a_read_only_view(
    tmp_path: Path, vocabulary: Vocabulary
) -> None:
    write_users(tmp_path / "users.jsonl", [(f"user {n}", ["some words"] * 9, "") for n in range(2_000)])
    store = build_store(config_for(tmp_path), vocabulary)
    pickled = pickle.dumps(store)
    assert len(pickled) < 500
    copy = pickle.loads(pickled)
    assert copy.tokens(7).tolist() == store.tokens(7).tolist()
    assert copy.users("eval").tolist() == store.users("eval").tolist()
    assert np.shares_memory(store.tokens(7), store.tokens(7))
    with pytest.raises(ValueError, match="read-only"):
        store.tokens(7)[0] = 1


def test_the_cache_is_used_until_the_content_changes(tmp_path: Path, vocabulary: Vocabulary) -> None:
    write_users(tmp_path / "users.jsonl", ANN_AND_BOB)
    config = config_for(tmp_path)
    store = build_store(config, vocabulary)
    (store.folder / "marker").touch()
    shutil.copy(tmp_path / "users.jsonl", tmp_path / "moved.jsonl")
    for same in (config, replace(config, seed=9), config_for(tmp_path, corpus=str(tmp_path / "moved.jsonl"))):
        assert (build_store(same, vocabulary).folder / "marker").exists()
    changed = [config_for(tmp_path, max_tokens_per_user=9), config_for(tmp_path, eval_fraction=0.2)]
    digests = {build_store(other, vocabulary).digest for other in changed}
    write_users(tmp_path / "users.jsonl", [*ANN_AND_BOB, ("eve", ["new"], "train")])
    digests |= {store.digest, build_store(config, vocabulary).digest}
    smaller = load_vocabulary(replace(CONFIG, vocabulary=VocabularyConfig(size=1_000)))
    digests |= {build_store(config, smaller).digest}
    assert len(digests) == 5


def test_two_processes_may_build_at_once(tmp_path: Path, vocabulary: Vocabulary) -> None:
    write_users(tmp_path / "users.jsonl", [(f"user {n}", ["some words"] * 20, "") for n in range(500)])
    program = (
        "from fedlm.config.schema import *\n"
        "from fedlm.data.store import build_store\n"
        "from fedlm.data.vocabulary_source import load_vocabulary\n"
        f"folder = {str(tmp_path)!r}\n"
        "data = DataConfig(corpus=folder + '/users.jsonl', cache_dir=folder + '/cache')\n"
        "config = Config(data=data, vocabulary=VocabularyConfig(size=2_000))\n"
        "print(build_store(config, load_vocabulary(config)).folder)"
    )
    command = [sys.executable, "-c", program]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert folders == {str(build_store(config_for(tmp_path), vocabulary).folder)}
    assert [path.name for path in (tmp_path / "cache" / "corpora").iterdir()] == [Path(folders.pop()).name]


@pytest.mark.parametrize(
    ("users", "complaint"),
    [
        ([], "is empty: 0 users and no text"),
        ([("ann", [" "], "train")], "is empty: 1 users and no text"),
        ([("bob", ["x"], "test")], r"leaves no training user \(0 train, 0 public, 1 eval\)"),
        ([("ann", ["x"], "train")], r"leaves no held-out user \(1 train, 0 public, 0 eval\)"),
        ([*ANN_AND_BOB, ("ann", ["again"], "train")], "user 'ann' occurs twice"),
        ([("ann", ["x"], "holdout")], "user 'ann' has split 'holdout'"),
    ],
)
def test_a_corpus_that_cannot_serve_is_refused_and_leaves_nothing(
    tmp_path: Path, vocabulary: Vocabulary, users: list[tuple[str, list[str], str]], complaint: str
) -> None:
    write_users(tmp_path / "users.jsonl", users)
    with pytest.raises(DataError, match=complaint):
        build_store(config_for(tmp_path, public_fraction=0), vocabulary)
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_a_damaged_store_is_named(tmp_path: Path, vocabulary: Vocabulary) -> None:
    write_users(tmp_path / "users.jsonl", ANN_AND_BOB)
    store = build_store(config_for(tmp_path), vocabulary)
    with pytest.raises(DataError, match="is not a token store"):
        TokenStore.open(tmp_path)
    (store.folder / "tokens.bin").write_bytes(b"1234")
    with pytest.raises(DataError, match="cut short; delete it"):
        TokenStore.open(store.folder)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, vocabulary: Vocabulary) -> None:
    write_users(tmp_path / "users.jsonl", ANN_AND_BOB)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write the cache .*set data\.cache_dir"):
        build_store(config_for(tmp_path, cache_dir=str(tmp_path / "file")), vocabulary)


def test_the_default_cache_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("platformdirs", reason="platformdirs is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "fedlm" in cache_folder(Config()).parts
    assert cache_folder(config_for(tmp_path)) == tmp_path / "cache"


def test_errors_are_one_line(tmp_path: Path, vocabulary: Vocabulary) -> None:
    with pytest.raises(FedlmError) as caught:
        build_store(config_for(tmp_path), vocabulary)
    assert "\n" not in str(caught.value)
    assert "no such file" in str(caught.value)
