"""A corpus with known entropies, so that a training run can be checked against the truth.

Words follow a Zipf-Mandelbrot law, p_r ~ 1 / (r + shift)^exponent, and each belongs to one of C classes of
nearly equal mass. The class of user u's next word comes from

    T_u = lambda A + (1 - lambda) 1 theta_u^T,        theta_u ~ Dirichlet(kappa pi)

where pi is the classes' mass and A a random stochastic matrix with stationary law pi: the Sinkhorn balancing
of exp(temperature * G), G standard normal. A word is then drawn within its class. Because E theta_u = pi, the
words of all users together follow the Zipf-Mandelbrot law exactly, and the population's pairs of words are
known too.

Legend: W words, C classes, U users, N words of one user. Source: ours (the design's data notes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlm.config.schema import Config, SyntheticConfig
from fedlm.data.chains import (
    Floats,
    Ints,
    balanced_classes,
    balanced_transition,
    class_sums,
    entropy,
    pick,
    row_entropies,
    rows_end_to_end,
    stationary_map,
    zipf_mandelbrot,
)
from fedlm.data.store_writer import UserTokens
from fedlm.data.users import assign_split
from fedlm.data.vocabulary import Vocabulary, vocabulary_from_words
from fedlm.data.words import PAD_MASS, SPECIALS
from fedlm.errors import DataError
from fedlm.randomness import seed_key, stream

# Users generated side by side: enough for numpy to be fast, few enough for small memory.
_USERS_AT_ONCE = 256


@dataclass(frozen=True)
class Entropies:
    """What a model can reach, in nats a word (perplexity is the exponential).

    Arguments:
        unigram: Knowing word frequencies alone.
        bigram: Knowing the previous word and the population's law.
        personal: Knowing the previous word and the user's own mixture: the floor of all models.
    """

    unigram: float
    bigram: float
    personal: float


class SyntheticCorpus:
    """The law of the corpus and its draws: a function of (settings, number of words, seed).

    Arguments:
        settings: The `[synthetic]` section.
        num_words: W; word 0 is the most frequent.
        seed: Every user is drawn from a stream of its own, so users do not depend on each other's order.

    Raises:
        DataError: There are fewer words than classes.
    """

    def __init__(self, settings: SyntheticConfig, num_words: int, seed: int) -> None:
        if num_words < settings.classes:
            raise DataError(
                f"synthetic.classes = {settings.classes} for {num_words} words; "
                f"allowed are 2 to {num_words}: lower it or raise vocabulary.size"
            )
        self.settings = settings
        self._key = seed_key(seed)
        self.word_law = zipf_mandelbrot(num_words, settings.zipf_exponent, settings.zipf_shift)  # (W,)
        self.word_class = balanced_classes(self.word_law, settings.classes)  # (W,)
        self.class_law = class_sums(self.word_class, self.word_law)  # (C,) pi
        shape = (settings.classes, settings.classes)
        affinity = stream(self._key, "synthetic-affinity").standard_normal(shape)  # (C, C) G
        self.transition = balanced_transition(settings.temperature * affinity, self.class_law)  # (C, C) A
        self._stationary = stationary_map(self.transition, self.class_law, settings.persistence)  # (C, C)

    def mixture(self, user: int) -> Floats:
        """Return theta_u (C,), drawn from the user's own stream."""
        generator = stream(self._key, "synthetic-mixture", user)
        return generator.dirichlet(self.settings.concentration * self.class_law)

    def entropies(self, num_users: int = 256) -> Entropies:
        """Return the entropies of words: two in closed form, the personal one exact for the users averaged.

        Arguments:
            num_users: Users to average the personal entropy over (about 4 ms each at 512 classes).
        """
        within = entropy(self.word_law) - entropy(self.class_law)  # H(word | its class), population
        personal = [self.personal_entropy(user) for user in range(min(num_users, self.settings.users))]
        return Entropies(
            unigram=entropy(self.word_law),
            bigram=entropy(self.class_pairs()) - entropy(self.class_law) + within,
            personal=float(np.mean(personal)),
        )

    def class_pairs(self) -> Floats:
        """Return the population's law of (previous class, next class), (C, C): the exact mean over users.

        lambda pi A + (1 - lambda) E[s_u theta_u^T] with s_u the user's stationary law, linear in theta_u, and
        the Dirichlet's second moment E[theta theta^T] = (diag(pi) + kappa pi pi^T) / (kappa + 1).
        """
        pi, kappa, weight = self.class_law, self.settings.concentration, self.settings.persistence
        second = (np.diag(pi) + kappa * np.outer(pi, pi)) / (kappa + 1)  # (C, C)
        return weight * pi[:, None] * self.transition + (1 - weight) * self._stationary.T @ second

    def personal_entropy(self, user: int) -> float:
        """Return the entropy rate of one user's chain of words, in nats."""
        theta = self.mixture(user)  # (C,)
        stationary = theta @ self._stationary  # (C,)
        rows = self.settings.persistence * self.transition + (1 - self.settings.persistence) * theta  # (C, C)
        return float(stationary @ (row_entropies(rows) + self._word_entropies()))

    def _word_entropies(self) -> Floats:
        """H(word | class), (C,); a stationary law weighs next classes as it weighs previous ones."""
        share = self.word_law / self.class_law[self.word_class]  # (W,)
        return class_sums(self.word_class, -share * np.log(share))

    def draw(self, users: range, num_words: int) -> Ints:
        """Return words 0 .. W-1 of some users, each chain started from its stationary law, (U, N) int64."""
        uniforms = np.stack(
            [stream(self._key, "synthetic-words", user).random((3, num_words)) for user in users], axis=1
        )  # (3, U, N)
        mixtures = np.stack([self.mixture(user) for user in users])  # (U, C)
        classes = self._draw_classes(mixtures, uniforms[0] < self.settings.persistence, uniforms[1])  # (U, N)
        return self._draw_words(classes, uniforms[2])

    def _draw_words(self, classes: Ints, uniforms: Floats) -> Ints:
        """Return a word of each class, by inversion of the law of all words sorted by class, (U, N)."""
        by_class = np.argsort(self.word_class, kind="stable")  # (W,)
        first = np.searchsorted(self.word_class[by_class], np.arange(self.settings.classes + 1))  # (C + 1,)
        edges = np.concatenate([[0.0], np.cumsum(self.word_law[by_class])])  # (W + 1,)
        low, high = first[classes], first[classes + 1]  # (U, N)
        points = edges[low] + uniforms * (edges[high] - edges[low])  # (U, N)
        found = np.searchsorted(edges, points, side="right") - 1  # (U, N)
        words: Ints = by_class[np.clip(found, low, high - 1)]  # rounding must not leave the class
        return words

    def _draw_classes(self, mixtures: Floats, follows: npt.NDArray[np.bool_], uniforms: Floats) -> Ints:
        """Return class chains (U, N).

        Arguments:
            mixtures: (U, C) theta of each user.
            follows: (U, N) True where A's row decides, False where theta does; the first word's is not used.
            uniforms: (U, N) for the inversion.
        """
        users = np.arange(len(mixtures))
        common, own = rows_end_to_end(self.transition), rows_end_to_end(mixtures)
        start = rows_end_to_end(mixtures @ self._stationary)
        num_classes, num_words = mixtures.shape[1], uniforms.shape[1]
        classes = np.empty(uniforms.shape, dtype=np.int64)
        classes[:, 0] = pick(start, users, uniforms[:, 0], num_classes)
        for n in range(1, num_words):
            followed = pick(common, classes[:, n - 1], uniforms[:, n], num_classes)  # (U,)
            fresh = pick(own, users, uniforms[:, n], num_classes)  # (U,)
            classes[:, n] = np.where(follows[:, n], followed, fresh)
        return classes


def synthetic_vocabulary(config: Config) -> Vocabulary:
    """Return the words of the synthetic corpus ("a", "b", ..., "aa", ...) with their exact frequencies."""
    num_words = config.vocabulary.size - len(SPECIALS)
    law = zipf_mandelbrot(num_words, config.synthetic.zipf_exponent, config.synthetic.zipf_shift)  # (W,)
    boundary = 1 / config.synthetic.tokens_per_user
    frequencies = np.concatenate([[PAD_MASS, boundary, PAD_MASS], law])  # (V,)
    return vocabulary_from_words([_name(rank) for rank in range(num_words)], frequencies, "synthetic")


def synthetic_users(config: Config, vocabulary: Vocabulary) -> Iterator[UserTokens]:
    """Yield every user's stream: a boundary, then the user's words, without a detour through text.

    Word r is the vocabulary's r-th most frequent entry that is not special; a word counts the bytes of its
    spelling and one for the space before it.
    """
    ids = _ids_by_rank(vocabulary)  # (W,)
    spelling_bytes = np.array([1 + len(vocabulary.decode([index]).encode()) for index in ids])  # (W,)
    settings = config.synthetic
    corpus = SyntheticCorpus(settings, len(ids), config.seed)
    num_words = min(settings.tokens_per_user, config.data.max_tokens_per_user - 1)
    boundary = np.array([vocabulary.boundary_id], dtype=np.int32)
    for first in range(0, settings.users, _USERS_AT_ONCE):
        users = range(first, min(first + _USERS_AT_ONCE, settings.users))
        for user, words in zip(users, corpus.draw(users, num_words), strict=True):
            name = f"synthetic-{user}"
            split = assign_split(name, "", config.data)
            tokens = np.concatenate([boundary, ids[words]])  # (N + 1,)
            yield UserTokens(name, split, tokens, int(spelling_bytes[words].sum()))


def _ids_by_rank(vocabulary: Vocabulary) -> npt.NDArray[np.int32]:
    """Return the ids that are not special by falling public frequency, (W,)."""
    order = np.argsort(-vocabulary.frequencies, kind="stable").astype(np.int32)
    return order[~np.isin(order, [vocabulary.pad_id, vocabulary.boundary_id, vocabulary.unknown_id])]


def _name(rank: int) -> str:
    """Spell a rank with letters: 0 is "a", 25 is "z", 26 is "aa"."""
    letters = ""
    rank += 1
    while rank:
        rank, letter = divmod(rank - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return letters
