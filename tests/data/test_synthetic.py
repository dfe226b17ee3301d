"""The synthetic corpus has the entropies that it claims: against brute force over words, and in samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fedlm.config.schema import Config, DataConfig, SyntheticConfig, VocabularyConfig
from fedlm.data.chains import balanced_classes, zipf_mandelbrot
from fedlm.data.store import build_store
from fedlm.data.synthetic import SyntheticCorpus
from fedlm.data.vocabulary_source import load_vocabulary
from fedlm.errors import DataError

SMALL = SyntheticConfig(users=200, classes=6, persistence=0.7, temperature=1.5, concentration=4.0)
NUM_WORDS = 40


@pytest.fixture(scope="module")
def corpus() -> SyntheticCorpus:
    return SyntheticCorpus(SMALL, NUM_WORDS, seed=1)


def word_chain(corpus: SyntheticCorpus, theta: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """One user's transition matrix over words (W, W), written out."""
    share = corpus.word_law / corpus.class_law[corpus.word_class]  # (W,)
    weight = corpus.settings.persistence
    classes = weight * corpus.transition + (1 - weight) * theta  # (C, C)
    return classes[np.ix_(corpus.word_class, corpus.word_class)] * share  # (W, W)


def stationary(chain: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    law = np.full(len(chain), 1 / len(chain))
    for _ in range(500):
        law = law @ chain
    return law


def test_the_transition_keeps_the_class_law(corpus: SyntheticCorpus) -> None:
    np.testing.assert_allclose(corpus.transition.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(corpus.class_law @ corpus.transition, corpus.class_law, atol=1e-12)


def test_classes_are_balanced_up_to_one_word() -> None:
    law = zipf_mandelbrot(10_000, 1.07, 2.7)
    masses = np.bincount(balanced_classes(law, 8), law)
    assert masses.max() - masses.min() < law[0]
    assert masses.max() < 1.01 / 8


def test_the_personal_entropy_is_that_of_the_chain_of_words(corpus: SyntheticCorpus) -> None:
    for user in range(5):
        chain = word_chain(corpus, corpus.mixture(user))
        brute = -(stationary(chain)[:, None] * chain * np.log(chain)).sum()
        assert corpus.personal_entropy(user) == pytest.approx(brute, rel=1e-9)


def test_the_population_pairs_are_the_mean_over_users(corpus: SyntheticCorpus) -> None:
    generator = np.random.default_rng(0)
    mean = np.zeros((SMALL.classes, SMALL.classes))
    num_users = 4_000
    for theta in generator.dirichlet(SMALL.concentration * corpus.class_law, num_users):
        chain = SMALL.persistence * corpus.transition + (1 - SMALL.persistence) * theta
        values, vectors = np.linalg.eig(chain.T)
        law = np.real(vectors[:, np.argmax(np.real(values))])
        mean += (law / law.sum())[:, None] * chain / num_users
    np.testing.assert_allclose(corpus.class_pairs(), mean, atol=2e-3)
    np.testing.assert_allclose(corpus.class_pairs().sum(axis=0), corpus.class_law, atol=1e-12)
    np.testing.assert_allclose(corpus.class_pairs().sum(axis=1), corpus.class_law, atol=1e-12)


def test_a_sample_has_the_claimed_entropies(corpus: SyntheticCorpus) -> None:
    num_users, num_words = SMALL.users, 3_000
    words = corpus.draw(range(num_users), num_words)  # (U, N)
    claimed = corpus.entropies(num_users)
    counts = np.bincount(words.reshape(-1), minlength=NUM_WORDS) / words.size
    assert -(counts * np.log(counts)).sum() == pytest.approx(claimed.unigram, abs=0.01)
    pairs = np.zeros((NUM_WORDS, NUM_WORDS))
    np.add.at(pairs, (words[:, :-1].reshape(-1), words[:, 1:].reshape(-1)), 1)
    law = pairs / pairs.sum()
    given_previous = law / law.sum(axis=1, keepdims=True)
    bigram = -(law * np.log(np.where(law > 0, given_previous, 1))).sum()
    assert bigram == pytest.approx(claimed.bigram, abs=0.01)
    chains = (word_chain(corpus, corpus.mixture(user)) for user in range(num_users))
    losses = [-np.log(chain[row[:-1], row[1:]]).mean() for chain, row in zip(chains, words, strict=True)]
    assert np.mean(losses) == pytest.approx(claimed.personal, abs=0.01)
    assert claimed.personal < claimed.bigram - 0.03 < claimed.unigram - 0.1


def test_the_reference_figures_are_met() -> None:
    figures = [SyntheticCorpus(SyntheticConfig(), 100_000, seed).entropies(32) for seed in (1, 2)]
    unigram, bigram, personal = np.exp(np.mean([[one.unigram, one.bigram, one.personal] for one in figures], axis=0))
    # Published figures of one draw of the affinities; draws differ by 4 %.
    assert unigram == pytest.approx(3_092, rel=0.001)
    assert bigram == pytest.approx(379, rel=0.05)
    assert personal == pytest.approx(259, rel=0.05)


@pytest.mark.parametrize("persistence", [0.0, 1.0])
def test_the_ends_of_persistence(persistence: float) -> None:
    corpus = SyntheticCorpus(replace(SMALL, persistence=persistence), NUM_WORDS, seed=1)
    found = corpus.entropies()
    if persistence == 1:  # no user has a taste
        assert found.personal == pytest.approx(found.bigram, rel=1e-9)
    chain = word_chain(corpus, corpus.mixture(0))
    brute = -(stationary(chain)[:, None] * chain * np.log(np.where(chain > 0, chain, 1))).sum()
    assert corpus.personal_entropy(0) == pytest.approx(brute, rel=1e-6)
    assert corpus.draw(range(3), 50).shape == (3, 50)


def test_a_user_does_not_depend_on_the_others(corpus: SyntheticCorpus) -> None:
    together = corpus.draw(range(5), 60)
    assert corpus.draw(range(3, 4), 60)[0].tolist() == together[3].tolist()
    assert together[3].tolist() != together[4].tolist()
    assert SyntheticCorpus(SMALL, NUM_WORDS, seed=2).draw(range(5), 60).tolist() != together.tolist()


def test_the_store_holds_the_draws_and_survives_a_text_round_trip(tmp_path: Path) -> None:
    config = Config(
        data=DataConfig(corpus="synthetic", cache_dir=str(tmp_path), max_tokens_per_user=31),
        synthetic=replace(SMALL, tokens_per_user=50),
        vocabulary=VocabularyConfig(size=NUM_WORDS + 3),
    )
    vocabulary = load_vocabulary(config)
    store = build_store(config, vocabulary)
    assert store.num_users == SMALL.users
    drawn = SyntheticCorpus(config.synthetic, NUM_WORDS, config.seed).draw(range(SMALL.users), 30)
    for user in range(SMALL.users):
        tokens = store.tokens(user)
        assert tokens.tolist() == [vocabulary.boundary_id, *(drawn[user] + 3).tolist()]
        text = vocabulary.decode(tokens[1:])
        assert vocabulary.encode(text).tolist() == tokens[1:].tolist()
        assert store.num_bytes[user] == len(text) + 1
    assert build_store(replace(config, seed=2), vocabulary).digest != store.digest


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(DataError, match=r"synthetic\.classes = 6 for 5 words; allowed are 2 to 5"):
        SyntheticCorpus(SMALL, 5, seed=1)
    with pytest.raises(DataError, match=r"lower synthetic\.temperature"):
        SyntheticCorpus(replace(SMALL, temperature=5_000.0), NUM_WORDS, seed=1)
