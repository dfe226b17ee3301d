"""Subwords of a `tokenizers` file, and their public frequencies: public words, cut and weighted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedlm.data.words import public_word_frequencies, utf8_bytes

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

# The 50,000 most frequent words are 98 % of running text; one occurrence in ten (ours) is capitalised.
_NUM_WORDS = 50_000
_CAPITALISED = 0.1
# Part of all mass that is spread evenly, so that subwords of no listed word are still drawn now and then.
_FLOOR = 0.01


@dataclass(frozen=True, eq=False)
class SubwordCodec:
    """Text <-> ids of a tokenizer, without the special tokens that its template would add."""

    tokenizer: Tokenizer

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Return the ids of a text (n,)."""
        return np.array(self._encoding(text).ids, dtype=np.int32)

    def prefix_bytes(self, text: str, num_tokens: int) -> int:
        """Return the UTF-8 bytes of `text` up to the end of its token number `num_tokens` (from 1).

        A character whose bytes are several tokens counts whole from its first token on.
        """
        _, end = self._encoding(text).offsets[num_tokens - 1]
        return utf8_bytes(text[:end])

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Return the text of some ids, special tokens spelled out."""
        return str(self.tokenizer.decode([int(index) for index in ids], skip_special_tokens=False))

    def _encoding(self, text: str) -> Encoding:
        # JSON can hold lone surrogates, which the library refuses; "?" keeps every position.
        return self.tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False)


def subword_frequencies(codec: SubwordCodec, size: int) -> npt.NDArray[np.float64]:
    """Return the relative frequency of every subword in public English, floor included.

    Arguments:
        codec: The tokenizer.
        size: Entries of the model's table, V; entries that the tokenizer never produces get the floor.

    Returns:
        (V,) float64, positive, sums to 1.
    """
    masses = np.zeros(size)  # (V,)
    for word, mass in islice(public_word_frequencies().items(), _NUM_WORDS):
        is_word = word[0].isalpha()
        variants = [(f" {word}", 1 - _CAPITALISED), (f" {word.capitalize()}", _CAPITALISED)] if is_word else [(word, 1)]
        for text, share in variants:
            np.add.at(masses, codec.encode(text), mass * share)
    frequencies: npt.NDArray[np.float64] = (1 - _FLOOR) * masses / masses.sum() + _FLOOR / size  # (V,)
    return frequencies
