"""Text canaries: random phrases, and how much better than chance a model knows them (Carlini et al. 2019, 1802.08232).

A phrase is some words (audit.phrase_words) drawn uniformly from the public vocabulary. After training, a canary's
phrase is ranked by its loss among R - 1 fresh phrases of the same law:

    exposure = log2 R - log2 rank

between 0 and log2 R. A phrase that nobody trained on has a uniform rank, hence an exposure of 1 / ln 2 = 1.44 in the
mean. Members are compared with strangers by a one-sided rank-sum test (Mann and Whitney 1947).

Exact: ranks under the full softmax, the law of strangers' exposures. Not a bound of epsilon: a phrase is what a user
would fear for, and its exposure shows memorisation where there is any; no exposure proves little.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedlm.config.schema import Config
from fedlm.data.vocabulary import Vocabulary
from fedlm.randomness import seed_key, stream

Tokens = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


def phrase(config: Config, vocabulary: Vocabulary, number: int) -> Tokens:
    """Return the phrase (audit.phrase_words,) of a canary."""
    key = seed_key(config.seed)
    return stream(key, "canary/phrase", number).choice(_words(vocabulary), config.audit.phrase_words)


def fresh_phrases(config: Config, vocabulary: Vocabulary) -> Tokens:
    """Return the R - 1 phrases (R - 1, audit.phrase_words) of the same law that no device holds."""
    shape = (config.audit.phrase_candidates - 1, config.audit.phrase_words)
    return stream(seed_key(config.seed), "canary/fresh_phrases").choice(_words(vocabulary), shape)


def canary_text(config: Config, vocabulary: Vocabulary, number: int) -> Tokens:
    """Return the stream (n,) of a device that wrote its phrase many times: `<s> phrase <s> phrase ... <s>`."""
    boundary = np.array([vocabulary.boundary_id], np.int32)
    message = np.concatenate([phrase(config, vocabulary, number), boundary])
    text = np.concatenate([boundary, np.tile(message, config.audit.phrase_repeats)])
    return text[: config.data.max_tokens_per_user]


def _words(vocabulary: Vocabulary) -> Tokens:
    """Return the ids of all words, the special entries left out."""
    ids = np.arange(vocabulary.size, dtype=np.int32)
    return ids[~np.isin(ids, [vocabulary.pad_id, vocabulary.boundary_id, vocabulary.unknown_id])]


def exposures(losses: Floats, fresh: Floats) -> Floats:
    """Return the exposure of each phrase (m,), in bits.

    Arguments:
        losses: (m,) of the canaries' phrases.
        fresh: (R - 1,) of phrases of the same law.

    Edge cases:
        A tie counts against the canary; a loss that is not finite ranks last.
    """
    ordered = np.sort(np.nan_to_num(fresh, nan=np.inf))
    ranks = 1 + np.searchsorted(ordered, np.nan_to_num(losses, nan=np.inf), side="right")  # (m,) in 1..R
    return np.asarray(np.log2(len(fresh) + 1) - np.log2(ranks))


def rank_sum_p(members: Floats, strangers: Floats) -> float | None:
    """Return the probability of exposures this high if members were strangers; None without both."""
    if not len(members) or not len(strangers):
        return None
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(members, strangers, alternative="greater").pvalue)
