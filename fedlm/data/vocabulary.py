"""The vocabulary and its frequencies, both public: row sampling, NCE and the embedding table rest on them.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from fedlm.data.words import (
    PAD_MASS,
    SPECIALS,
    WordCodec,
    boundary_frequency,
    public_word_frequencies,
    utf8_bytes,
)
from fedlm.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What common tokenizers call the end of a text, padding, and an unknown piece, in order of preference.
_BOUNDARIES = ("<s>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|im_end|>")
_PADS = ("<pad>", "[PAD]", "<|pad|>", "<|endoftext|>")
_UNKNOWNS = ("<unk>", "[UNK]", "<|unk|>")


class Codec(Protocol):
    """How text becomes ids and back: words (`WordCodec`) or subwords (`SubwordCodec`)."""

    def encode(self, text: str) -> npt.NDArray[np.int32]: ...

    def prefix_bytes(self, text: str, num_tokens: int) -> int: ...

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str: ...


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A public vocabulary.

    Arguments:
        frequencies: (V,) float64, positive, sums to 1; made read-only.
        codec: Text to ids and back.
        name: What the codec is, for the digest: equal digests mean equal ids and frequencies.
        pad_id: Fills batches; never a target.
        boundary_id: Begins a user's text and ends each message ("<s>").
        unknown_id: Stands for what the vocabulary lacks.
    """

    frequencies: npt.NDArray[np.float64]
    codec: Codec
    name: str
    pad_id: int = 0
    boundary_id: int = 1
    unknown_id: int = 2

    def __post_init__(self) -> None:
        assert (self.frequencies > 0).all(), "a word of frequency 0 could never be a negative"
        assert abs(self.frequencies.sum() - 1) < 1e-9
        self.frequencies.flags.writeable = False

    @property
    def size(self) -> int:
        """V, special entries included."""
        return len(self.frequencies)

    @property
    def digest(self) -> str:
        """32 hex digits over everything that determines ids and frequencies."""
        ids = f"{self.pad_id}/{self.boundary_id}/{self.unknown_id}"
        digest = blake2b(f"{ids}/{self.name}".encode(), digest_size=16)
        digest.update(self.frequencies.tobytes())
        return digest.hexdigest()

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Return the ids of one message (n,), without boundaries."""
        return self.codec.encode(text)

    def encode_with_bytes(self, text: str, max_tokens: int) -> tuple[npt.NDArray[np.int32], int]:
        """Return the first ids of one message, at most `max_tokens`, and the UTF-8 bytes that they cover.

        A message that is kept whole counts all its bytes, spaces at the end included.
        """
        ids = self.codec.encode(text)
        if len(ids) <= max_tokens:
            return ids, utf8_bytes(text)
        return ids[:max_tokens], self.codec.prefix_bytes(text, max_tokens) if max_tokens else 0

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Return readable text; case and spacing may be lost."""
        return self.codec.decode(ids)


def vocabulary_from_words(words: Sequence[str], frequencies: npt.NDArray[np.float64], name: str) -> Vocabulary:
    """Return a vocabulary of `SPECIALS` and then `words`, with their public frequencies (V,)."""
    all_words = (*SPECIALS, *words)
    assert len(all_words) == len(frequencies)
    digest = blake2b("\n".join(all_words).encode(), digest_size=16).hexdigest()
    return Vocabulary(frequencies / frequencies.sum(), WordCodec(all_words), f"{name} {digest}")


def vocabulary_from_tokenizer(
    tokenizer: Tokenizer,
    size: int,
    *,
    boundary_id: int | None = None,
    pad_id: int | None = None,
    unknown_id: int | None = None,
) -> Vocabulary:
    """Return the vocabulary of a `tokenizers.Tokenizer`.

    Arguments:
        tokenizer: Any tokenizer; its template's special tokens are not added to messages.
        size: Rows of the model's embedding table, at least the tokenizer's size (tables are often padded).
        boundary_id: The token between messages; by default the tokenizer's own (<s>, <|endoftext|>, ...).
        pad_id, unknown_id: By default the tokenizer's own, else the boundary.

    Raises:
        DataError: `size` is too small, or no boundary token is found.
    """
    from fedlm.data.subwords import SubwordCodec, subword_frequencies

    own_size = _num_entries(tokenizer)
    if size < own_size:
        raise DataError(f"vocabulary size {size} cannot hold the tokenizer's {own_size} entries; use {own_size}")
    boundary = _first_id(tokenizer, _BOUNDARIES) if boundary_id is None else boundary_id
    if boundary is None:
        raise DataError(f"the tokenizer has no token to separate messages; add one of {', '.join(_BOUNDARIES)}")
    pad = _first_id(tokenizer, _PADS) if pad_id is None else pad_id
    unknown = _first_id(tokenizer, _UNKNOWNS) if unknown_id is None else unknown_id
    codec = SubwordCodec(tokenizer)
    frequencies = subword_frequencies(codec, size)  # (V,)
    frequencies[boundary] += boundary_frequency()
    return Vocabulary(
        frequencies / frequencies.sum(),
        codec,
        f"tokenizer {blake2b(tokenizer.to_str().encode(), digest_size=16).hexdigest()}",
        pad_id=boundary if pad is None else pad,
        boundary_id=boundary,
        unknown_id=boundary if unknown is None else unknown,
    )


def vocabulary_from_wordfreq(size: int) -> Vocabulary:
    """Take the most frequent public words and marks; the mass of all others goes to <unk>."""
    masses = public_word_frequencies()
    largest = len(masses) + len(SPECIALS)
    if size > largest:
        raise DataError(f"vocabulary.size = {size:,}: wordfreq has {largest:,} entries; use that or less")
    kept = dict(islice(masses.items(), size - len(SPECIALS)))
    boundary = boundary_frequency()
    unknown = 1.0 - boundary - PAD_MASS - sum(kept.values())
    frequencies = np.array([PAD_MASS, boundary, unknown, *kept.values()])  # (V,)
    return vocabulary_from_words(tuple(kept), frequencies, "wordfreq")


def vocabulary_from_file(source: str, size: int) -> Vocabulary:
    """Read a tokenizer.json file."""
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(f"no vocabulary {source!r}: vocabulary.source is wordfreq, model, or a tokenizer.json file")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} is not a tokenizer.json file: {error}") from None
    own_size = _num_entries(tokenizer)
    if size != own_size:
        raise DataError(f"vocabulary.size = {size:,}, but {path} has {own_size:,} entries; set the size to {own_size}")
    return vocabulary_from_tokenizer(tokenizer, size)


def _num_entries(tokenizer: Tokenizer) -> int:
    """Return the rows that a table needs; ids can have gaps, so this is not the number of tokens."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def _first_id(tokenizer: Tokenizer, names: Sequence[str]) -> int | None:
    """Return the id of the first of some tokens that the tokenizer has."""
    ids = (tokenizer.token_to_id(name) for name in names)
    return next((index for index in ids if index is not None), None)
