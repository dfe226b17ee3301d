"""What a mistyped key or word was meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


def nearest_word(word: str, words: Iterable[str]) -> str | None:
    """Return the one of `words` that `word` is a likely misspelling of, or None.

    >>> nearest_word("Gausian", ("gaussian", "laplace"))
    'gaussian'
    """
    return max(
        (known for known in words if _likeness(word, known) >= 0.6),
        key=lambda known: _likeness(word, known),
        default=None,
    )


def nearest_key(path: str, paths: Iterable[str]) -> str | None:
    """Return the dotted key that `path` was meant to be, or None when nothing is near.

    A right name in a wrong section (`trainable.rank`) beats every near name; the whole path breaks ties.

    >>> nearest_key("model.cohort", ["model.tied", "fleet.cohort", "model.dropout"])
    'fleet.cohort'
    """
    leaf = path.rpartition(".")[2]

    def rank(known: str) -> tuple[bool, float]:
        known_leaf = known.rpartition(".")[2]
        return known_leaf == leaf, _likeness(path, known) + _likeness(leaf, known_leaf)

    best = max(paths, key=rank, default=None)
    return best if best is not None and rank(best)[1] >= 1.1 else None


def _likeness(a: str, b: str) -> float:
    return SequenceMatcher(None, a.lower().replace("-", "_"), b.lower()).ratio()
