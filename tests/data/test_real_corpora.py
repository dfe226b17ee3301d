"""The real corpora: published counts, the cap, and how much of the text the public vocabulary knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedlm.config.schema import Config, DataConfig
from fedlm.data.corpora import read_users
from fedlm.data.store import TokenStore, build_store
from fedlm.data.vocabulary import Vocabulary
from fedlm.data.vocabulary_source import load_vocabulary

IRC = Path(__file__).resolve().parents[3] / "shared" / "data" / "ubuntu_irc" / "ubuntu_irc.users.jsonl.xz"


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return load_vocabulary(Config())


@pytest.fixture(scope="module")
def chitchat(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> TokenStore:
    config = Config(data=DataConfig(cache_dir=str(tmp_path_factory.mktemp("cache"))))
    return build_store(config, vocabulary)


def unknown_share(store: TokenStore, vocabulary: Vocabulary, split: str) -> float:
    tokens = np.concatenate([store.tokens(user) for user in store.users(split)])
    words = tokens[tokens != vocabulary.boundary_id]
    return float((words == vocabulary.unknown_id).mean())


def test_chitchat_has_its_published_counts() -> None:
    users = list(read_users(Config()))
    assert len(users) == len({user.user for user in users}) == 1_315
    assert sum(len(user.texts) for user in users) == 258_145
    assert sum(len(text.split()) for user in users for text in user.texts) == pytest.approx(2.48e6, rel=0.005)


def test_chitchat_is_capped_and_mostly_known(chitchat: TokenStore, vocabulary: Vocabulary) -> None:
    assert chitchat.num_users == 1_315
    assert chitchat.num_tokens.max() == DataConfig().max_tokens_per_user
    assert all(chitchat.tokens(user)[0] == vocabulary.boundary_id for user in range(chitchat.num_users))
    assert unknown_share(chitchat, vocabulary, "eval") < 0.03
    assert min(len(chitchat.users(split)) for split in ("train", "public", "eval")) > 100


def test_public_frequencies_are_near_those_of_chat(chitchat: TokenStore, vocabulary: Vocabulary) -> None:
    tokens = np.concatenate([chitchat.tokens(user) for user in chitchat.users("train")])
    counts = np.bincount(tokens, minlength=vocabulary.size) / len(tokens)
    entropy = -(counts[counts > 0] * np.log(counts[counts > 0])).sum()
    cross_entropy = -(counts * np.log(vocabulary.frequencies)).sum()
    assert cross_entropy - entropy < 0.8  # nats a token; the uniform law is 4 nats off


def test_irc_keeps_its_own_split(tmp_path: Path, vocabulary: Vocabulary) -> None:
    if not IRC.exists():
        pytest.skip("shared/data/ubuntu_irc is not beside the project")
    config = Config(data=DataConfig(corpus=str(IRC), cache_dir=str(tmp_path), max_tokens_per_user=100))
    store = build_store(config, vocabulary)
    assert store.num_users == 15_720
    assert len(store.users("eval")) == 807 + 797
    assert len(store.users("train")) + len(store.users("public")) == 14_116
