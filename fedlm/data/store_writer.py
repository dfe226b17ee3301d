"""The files of a token store and their writer, which holds three numbers and a name for each user.

tokens.bin    int32, little-endian: all streams, one after another
offsets.npy   (U + 1,) int64: where each user's stream begins
bytes.npy     (U,) int64: UTF-8 bytes of the kept text
splits.npy    (U,) int8: index into SPLITS
users.txt     one JSON string a line: names
meta.json     what this is, for people and for checks
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlm.data.users import SPLITS
from fedlm.errors import DataError

TOKENS, USERS, META = "tokens.bin", "users.txt", "meta.json"
OFFSETS, BYTES, SPLIT_CODES = "offsets.npy", "bytes.npy", "splits.npy"
TOKEN_DTYPE = np.dtype("<i4")


@dataclass(frozen=True, slots=True)
class UserTokens:
    """One user's stream of token ids (n,) int32, the UTF-8 bytes that it covers, and the user's split."""

    user: str
    split: str
    tokens: npt.NDArray[np.int32]
    num_bytes: int


@dataclass
class StoreWriter:
    """Writes one store into an existing, empty folder; a context manager. Empty users are only counted."""

    folder: Path
    num_without_text: int = 0
    _offsets: array[int] = field(default_factory=lambda: array("q", [0]))
    _bytes: array[int] = field(default_factory=lambda: array("q"))
    _codes: array[int] = field(default_factory=lambda: array("b"))
    _names: set[str] = field(default_factory=set)
    _files: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> StoreWriter:
        self._tokens_file = self._files.enter_context((self.folder / TOKENS).open("wb"))
        self._users_file = self._files.enter_context((self.folder / USERS).open("w", encoding="ascii"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def add(self, user: UserTokens) -> None:
        """Append one user.

        Raises:
            DataError: The name occurred before. (Merging would need the whole corpus in memory, and a person
                under two names would break the unit of privacy without a word.)
        """
        if user.user in self._names:
            raise DataError(f"user {user.user!r} occurs twice in the corpus; put each user's texts together")
        self._names.add(user.user)
        if len(user.tokens) == 0:
            self.num_without_text += 1
            return
        self._tokens_file.write(user.tokens.astype(TOKEN_DTYPE, copy=False).tobytes())
        self._users_file.write(json.dumps(user.user) + "\n")
        self._offsets.append(self._offsets[-1] + len(user.tokens))
        self._bytes.append(user.num_bytes)
        self._codes.append(SPLITS.index(user.split))

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Check that users train and are held out, and write the tables and `facts` with the counts.

        Raises:
            DataError: There is no text at all, no training user, or no held-out user.
        """
        offsets, codes = np.array(self._offsets), np.array(self._codes, dtype=np.int8)
        counts = {split: int((codes == code).sum()) for code, split in enumerate(SPLITS)}
        _check_counts(counts, len(self._names), str(facts.get("corpus")))
        lengths = np.diff(offsets)  # (U,)
        tokens = {split: int(lengths[codes == code].sum()) for code, split in enumerate(SPLITS)}
        np.save(self.folder / OFFSETS, offsets)
        np.save(self.folder / BYTES, np.array(self._bytes))
        np.save(self.folder / SPLIT_CODES, codes)
        meta = {**facts, "users": counts, "tokens": tokens, "users_without_text": self.num_without_text}
        (self.folder / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="ascii")


def _check_counts(counts: Mapping[str, int], num_read: int, corpus: str) -> None:
    if not sum(counts.values()):
        raise DataError(f"corpus {corpus!r} is empty: {num_read} users and no text; check data.corpus")
    found = ", ".join(f"{count} {split}" for split, count in counts.items())
    if not counts["train"]:
        raise DataError(f"corpus {corpus!r} leaves no training user ({found}); lower data.public_fraction or add users")
    if not counts["eval"]:
        raise DataError(
            f"corpus {corpus!r} leaves no held-out user ({found}); raise data.eval_fraction, add users, "
            "or split plain text by line"
        )
