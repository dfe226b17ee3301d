"""Memory-mapped tokens by user: a corpus is read once, and workers hold no Python object for each user.

A user's stream is `<s> m1 <s> m2 <s> ... <s>`. Its bytes are those of the kept text and one for each
message's end (the first `<s>` is never predicted and counts none), so bits per byte is comparable across
vocabularies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlm.config.schema import Config
from fedlm.data.cache import cache_folder as cache_folder
from fedlm.data.cache import content_key, publish_folder
from fedlm.data.corpora import fingerprint, read_users
from fedlm.data.store_writer import (
    BYTES,
    META,
    OFFSETS,
    SPLIT_CODES,
    TOKEN_DTYPE,
    TOKENS,
    StoreWriter,
    UserTokens,
)
from fedlm.data.users import SPLITS, UserTexts, assign_split
from fedlm.data.vocabulary import Vocabulary
from fedlm.errors import DataError

# Raise it when the meaning of the files changes: caches of older versions are then built again.
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class TokenStore:
    """One corpus as token ids; users are numbered 0 .. U-1 in the corpus's order. Pickles as its folder.

    Arguments:
        folder: Where the files lie.
        meta: What `meta.json` says: corpus, source, counts, digest.
        offsets: (U + 1,) int64, memory-mapped.
        num_tokens: (U,) int64, with boundaries.
        num_bytes: (U,) int64, UTF-8 bytes of exactly the kept tokens.
    """

    folder: Path
    meta: dict[str, Any]
    offsets: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]
    num_bytes: npt.NDArray[np.int64]

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Open a store.

        Raises:
            DataError: The folder is not a complete store of this version.
        """
        try:
            meta = json.loads((folder / META).read_text(encoding="ascii"))
            offsets = np.load(folder / OFFSETS, mmap_mode="r")
            num_bytes = np.load(folder / BYTES, mmap_mode="r")
            size_bytes = (folder / TOKENS).stat().st_size
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} is not a token store ({error}); delete it and run again") from None
        if meta.get("format") != _FORMAT or size_bytes != offsets[-1] * TOKEN_DTYPE.itemsize:
            raise DataError(f"token store {folder} is of another version or cut short; delete it and run again")
        return cls(folder, meta, offsets, np.diff(offsets), num_bytes)

    def __reduce__(self) -> tuple[Callable[[Path], TokenStore], tuple[Path]]:
        return TokenStore.open, (self.folder,)

    @property
    def num_users(self) -> int:
        """U, all splits together."""
        return len(self.num_tokens)

    @property
    def digest(self) -> str:
        """32 hex digits that name the content."""
        return str(self.meta["digest"])

    def tokens(self, user: int) -> npt.NDArray[np.int32]:
        """Return one user's stream (n,) as a read-only view of the file."""
        return self._tokens[self.offsets[user] : self.offsets[user + 1]]

    def users(self, split: str) -> npt.NDArray[np.int64]:
        """Return the numbers of the users of "train", "public" or "eval", ascending (u,)."""
        return np.flatnonzero(self._codes == SPLITS.index(split))

    @cached_property
    def _tokens(self) -> npt.NDArray[np.int32]:
        return np.memmap(self.folder / TOKENS, dtype=TOKEN_DTYPE, mode="r").view(np.ndarray)

    @cached_property
    def _codes(self) -> npt.NDArray[np.int8]:
        codes: npt.NDArray[np.int8] = np.load(self.folder / SPLIT_CODES)
        return codes


def build_store(config: Config, vocabulary: Vocabulary) -> TokenStore:
    """Return the token store of `config.data.corpus`, from the cache or built now.

    Arguments:
        config: The data section, and for the synthetic corpus its section and the seed.
        vocabulary: Encodes the texts.

    Raises:
        DataError: The corpus cannot be read, a user occurs twice, or no user is left to train or to hold out.
        OutputError: The cache cannot be written.
    """
    facts = _facts(config, vocabulary)
    digest = content_key(facts)
    folder = cache_folder(config) / "corpora" / digest
    if not folder.is_dir():
        with publish_folder(folder) as temporary, StoreWriter(temporary) as writer:
            for user in _user_tokens(config, vocabulary):
                writer.add(user)
            writer.finish({"corpus": config.data.corpus, "digest": digest, **facts})
    return TokenStore.open(folder)


def _facts(config: Config, vocabulary: Vocabulary) -> dict[str, Any]:
    """Everything that determines the content, readable; not the path, so a moved file stays cached."""
    data = config.data
    return {
        "format": _FORMAT,
        "source": fingerprint(config),
        "max_tokens_per_user": data.max_tokens_per_user,
        "public_fraction": data.public_fraction,
        "eval_fraction": data.eval_fraction,
        "vocabulary_size": vocabulary.size,
        "vocabulary_digest": vocabulary.digest,
    }


def _user_tokens(config: Config, vocabulary: Vocabulary) -> Iterator[UserTokens]:
    """Yield every user's stream with its split."""
    if config.data.corpus == "synthetic":
        from fedlm.data.synthetic import synthetic_users

        yield from synthetic_users(config, vocabulary)
        return
    for user in read_users(config):
        tokens, num_bytes = _encode_user(user, vocabulary, config.data.max_tokens_per_user)
        yield UserTokens(user.user, assign_split(user.user, user.split, config.data), tokens, num_bytes)


def _encode_user(user: UserTexts, vocabulary: Vocabulary, max_tokens: int) -> tuple[npt.NDArray[np.int32], int]:
    """Return a user's stream, cut at `max_tokens`, and its bytes; empty if no message has a token."""
    boundary = np.array([vocabulary.boundary_id], dtype=np.int32)
    parts, room, num_bytes = [boundary], max_tokens - 1, 0
    for text in user.texts:
        if room == 0:
            break
        ids, text_bytes = vocabulary.encode_with_bytes(text, room)
        if len(ids) == 0:
            continue
        ends = min(1, room - len(ids))  # 0 when the message filled the room
        parts += [ids, boundary[:ends]]
        room -= len(ids) + ends
        num_bytes += text_bytes + ends
    return np.concatenate(parts if len(parts) > 1 else [boundary[:0]]), num_bytes
