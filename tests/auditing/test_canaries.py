"""Canaries: the same signs wherever they are drawn, fair coins, nearly orthogonal; and phrases with their exposure."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedlm.auditing import Canaries
from fedlm.auditing.text import canary_text, exposures, fresh_phrases, phrase, rank_sum_p
from fedlm.config.load import load_config
from fedlm.data.vocabulary_source import load_vocabulary
from fedlm.trainable.spec import UpdateSpec

FULL = UpdateSpec.build([("w", "dense", (7, 3)), ("table", "rows", (50, 13)), ("bias", "rows", (50,))])


def test_a_coordinate_has_one_sign_in_every_round() -> None:
    canaries = Canaries(4, 100, 20, 0)
    for number in (0, 19):
        whole = canaries.signs(number, FULL)
        assert set(whole.tolist()) == {-1.0, 1.0}
        for rows in ([3], [0, 7, 49], list(range(50))):
            spec = FULL.with_rows(np.array(rows))
            assert np.array_equal(canaries.signs(number, spec), spec.gather(whole))


def test_directions_are_fair_and_nearly_orthogonal() -> None:
    spec, canaries = UpdateSpec.build([("a", "dense", (4_000,)), ("b", "lora_a", (6_000,))]), Canaries(4, 0, 150, 0)
    signs = np.concatenate([batch for _, batch in canaries.batches(spec)])  # (k, P)
    overlaps = (signs @ signs.T / math.sqrt(10_000))[np.triu_indices(150, 1)]
    assert np.abs(overlaps).max() < 5.5
    assert overlaps.std() == pytest.approx(1, abs=0.05)
    assert abs(signs.mean()) < 5 / math.sqrt(signs.size)


def test_coins_are_fair_and_belong_to_the_seed() -> None:
    members = Canaries(1, 0, 3_000, 1_000).members()
    assert members.mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(4_000))
    assert not np.array_equal(members, Canaries(2, 0, 3_000, 1_000).members())


def test_who_is_what() -> None:
    canaries = Canaries(1, 10, 3, 2)
    assert [canaries.number(device) for device in (9, 10, 14)] == [None, 0, 4]
    assert [canaries.is_text(number) for number in range(5)] == [False, False, False, True, True]


def test_a_phrase_is_words_and_its_device_repeats_it() -> None:
    sizes = ["vocabulary.size=600", "pretrain.negatives=99", "loss.negatives=99", "trainable.embedding_rows.count=99"]
    phrases = ["audit.phrase_words=5", "audit.phrase_repeats=3"]
    config = load_config(None, ["data.corpus=synthetic", *sizes, *phrases])
    vocabulary = load_vocabulary(config)
    words = phrase(config, vocabulary, 2)
    boundary = [vocabulary.boundary_id]
    assert canary_text(config, vocabulary, 2).tolist() == boundary + 3 * (words.tolist() + boundary)
    fresh = fresh_phrases(config, vocabulary)
    assert fresh.shape == (1023, 5)
    assert not {vocabulary.pad_id, vocabulary.boundary_id, vocabulary.unknown_id} & set(fresh.ravel().tolist())
    counts = np.bincount(fresh.ravel(), minlength=vocabulary.size)[3:]
    assert counts.max() < 5 * counts.mean()  # uniform, not by frequency


def test_exposure_is_that_of_the_rank() -> None:
    fresh = np.array([5.0, 1.0, 3.0])
    found = exposures(np.array([0.5, 1.0, 2.0, 9.0, math.nan]), fresh)
    assert found == pytest.approx([2.0, 1.0, 1.0, 0.0, 0.0])  # ranks 1, 2 (a tie), 2, 4, 4 of 4


def test_strangers_have_the_exposure_of_chance_and_members_stand_out() -> None:
    generator = np.random.default_rng(1)
    fresh = generator.normal(size=1_023)
    strangers, members = (exposures(generator.normal(shift, 1, 400), fresh) for shift in (0.0, -1.5))
    assert strangers.mean() == pytest.approx(1 / math.log(2), abs=4 * 1.44 / math.sqrt(400))
    assert rank_sum_p(members, strangers) < 1e-9
    assert rank_sum_p(strangers, strangers) > 0.4
    assert rank_sum_p(members[:0], strangers) is None
