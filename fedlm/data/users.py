"""One user's text, and which users train, publish, or are held out.

The split is a function of the user's name alone (or the corpus's own), so it is the same for every seed and
every vocabulary, and a held-out user never becomes a training user when a fraction of the *other* kind
changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from fedlm.config.schema import DataConfig
from fedlm.errors import DataError

SPLITS = ("train", "public", "eval")

_OWN_SPLITS = {
    "train": "train",
    "public": "public",
    "eval": "eval",
    "dev": "eval",
    "valid": "eval",
    "validation": "eval",
    "test": "eval",
}


@dataclass(frozen=True, slots=True)
class UserTexts:
    """What one user wrote: messages in order, and the corpus's own split if it has one."""

    user: str
    texts: Sequence[str]
    split: str = ""


def assign_split(user: str, own_split: str, data: DataConfig) -> str:
    """Return "train", "public" or "eval" for one user.

    Arguments:
        user: The user's name.
        own_split: The corpus's word for it (train, dev, valid, validation, test, public, eval), or empty:
            then `eval_fraction` of all users are held out by a hash of the name.
        data: `public_fraction` of the users who are not held out publish their text, by a second hash.

    Raises:
        DataError: `own_split` is none of the words above.
    """
    if own_split and own_split not in _OWN_SPLITS:
        allowed = ", ".join(_OWN_SPLITS)
        raise DataError(f"user {user!r} has split {own_split!r}; allowed are {allowed}, or none")
    split = _OWN_SPLITS[own_split] if own_split else "train"
    if not own_split and _uniform("eval", user) < data.eval_fraction:
        return "eval"
    if split == "train" and _uniform("public", user) < data.public_fraction:
        return "public"
    return split


def _uniform(purpose: str, user: str) -> float:
    """Hash a name to [0, 1)."""
    message = f"{purpose}/{user}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(message, digest_size=8).digest(), "big") / 2**64
