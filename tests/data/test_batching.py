"""Batches lose no target, repeat none, and evaluation takes whole users."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlm.config.schema import Config, DataConfig, SyntheticConfig, VocabularyConfig
from fedlm.data.batching import Batch, evaluation_users, local_batches, sequences
from fedlm.data.store import TokenStore, build_store
from fedlm.data.vocabulary_source import load_vocabulary

lengths = st.integers(1, 9)
# Positions stand for tokens: a pair then says where it comes from.
streams = st.integers(0, 60).map(lambda n: np.arange(100, 100 + n, dtype=np.int32))


def pairs(batch: Batch) -> list[tuple[int, int]]:
    return list(zip(batch.inputs[batch.mask].tolist(), batch.targets[batch.mask].tolist(), strict=True))


@given(tokens=streams, length=lengths)
def test_windows_hold_every_target_once_and_in_order(tokens: npt.NDArray[np.int32], length: int) -> None:
    batch = sequences(tokens, length)
    assert pairs(batch) == list(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    assert batch.inputs.shape == (int(np.ceil(max(len(tokens) - 1, 0) / length)), length)
    assert not batch.inputs[~batch.mask].any()
    assert not batch.targets[~batch.mask].any()
    assert (np.diff(batch.mask.astype(int), axis=1) <= 0).all()  # padding only at the end
    assert batch.mask[:-1].all()


@given(tokens=streams, length=lengths, batch_size=st.integers(1, 5), epochs=st.integers(1, 3))
def test_each_epoch_visits_every_sequence_once(
    tokens: npt.NDArray[np.int32], length: int, batch_size: int, epochs: int
) -> None:
    generator = np.random.default_rng(0)
    batches = list(local_batches(tokens, length=length, batch_size=batch_size, epochs=epochs, generator=generator))
    windows = sequences(tokens, length)
    in_epoch = -(-len(windows.inputs) // batch_size)
    assert len(batches) == epochs * in_epoch
    for epoch in range(epochs):
        seen = [pair for batch in batches[epoch * in_epoch : (epoch + 1) * in_epoch] for pair in pairs(batch)]
        assert sorted(seen) == pairs(windows)
    for batch in batches:
        assert len(batch.inputs) <= batch_size
        assert batch.mask.sum(axis=1).max() == batch.inputs.shape[1]  # cut to the longest
        assert batch.num_targets == batch.mask.sum()


def test_the_generator_decides_the_order() -> None:
    tokens = np.arange(200, dtype=np.int32)

    def first_inputs(seed: int) -> list[int]:
        generator = np.random.default_rng(seed)
        batches = local_batches(tokens, length=4, batch_size=8, epochs=2, generator=generator)
        return [row for batch in batches for row in batch.inputs[:, 0].tolist()]

    assert first_inputs(1) == first_inputs(1) != first_inputs(2)
    assert first_inputs(1)[:50] != first_inputs(1)[50:]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    config = Config(
        data=DataConfig(corpus="synthetic", cache_dir=str(tmp_path_factory.mktemp("cache")), eval_fraction=0.3),
        synthetic=SyntheticConfig(users=60, tokens_per_user=20, classes=4),
        vocabulary=VocabularyConfig(size=64),
    )
    return build_store(config, load_vocabulary(config))


@pytest.mark.parametrize("max_tokens", [1, 21, 22, 100, 10**9])
def test_evaluation_takes_the_fewest_whole_users_that_suffice(store: TokenStore, max_tokens: int) -> None:
    users = evaluation_users(store, max_tokens, np.random.default_rng(3))
    held_out = set(store.users("eval").tolist())
    assert len(set(users.tolist())) == len(users) >= 1
    assert set(users.tolist()) <= held_out
    total = store.num_tokens[users].sum()
    assert total >= max_tokens or set(users.tolist()) == held_out
    assert total - store.num_tokens[users[-1]] < max_tokens
    again = evaluation_users(store, max_tokens, np.random.default_rng(3))
    assert again.tolist() == users.tolist()


def test_a_larger_budget_adds_users_to_the_same_order(store: TokenStore, tmp_path: Path) -> None:
    few = evaluation_users(store, 50, np.random.default_rng(5))
    many = evaluation_users(store, 200, np.random.default_rng(5))
    assert many[: len(few)].tolist() == few.tolist()
    assert len(many) > len(few)
