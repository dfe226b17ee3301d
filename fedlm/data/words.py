"""Words: how text is cut into them, and how often each occurs in public English.

Frequencies come from `wordfreq` (321,180 words of the large English list), which has no punctuation, and from
the constants below. Nothing here depends on a corpus that a federation trains on, so vocabulary and
frequencies are public. As in that list, text is lower-cased, curly quotes are straightened, and digits of
numbers with more than one are written 0 ("2018" is "0000"): the vocabulary then holds every number's shape
and not a sample of numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

SPECIALS = ("<pad>", "<s>", "<unk>")

# Marks per 1,000 running words. The first eight: V. Cook, "Standard punctuation and the punctuation of the
# street", in Essential Topics in Applied Linguistics and Multilingualism, Springer 2013, pp. 267-290 (459,000
# words). The others, and the apostrophe outside a word, are our orders of magnitude.
# fmt: off
MARKS_PER_THOUSAND_WORDS: Mapping[str, float] = {
    ".": 65.3, ",": 61.6, '"': 26.7, "-": 15.3, "?": 5.6, ":": 3.4, "!": 3.3, ";": 3.2,
    "'": 4.0, "(": 2.5, ")": 2.5, "/": 1.0, "\u2026": 0.5, "\u2013": 0.5, "\u2014": 0.5,
    "*": 0.3, "&": 0.3, "%": 0.3, "$": 0.3, "#": 0.2, "@": 0.2, "+": 0.2, "=": 0.2, "<": 0.2, ">": 0.2,
    "[": 0.2, "]": 0.2, "_": 0.1, "~": 0.1, "|": 0.1, "\\": 0.1, "^": 0.1, "{": 0.1, "}": 0.1, "`": 0.1,
    "\u00a3": 0.1, "\u20ac": 0.1,
}
# fmt: on
# Ours: a message has ten words. <pad> is never a target; its mass only keeps every frequency positive.
BOUNDARIES_PER_THOUSAND_WORDS = 100.0
PAD_MASS = 1e-9
# All mass per word: words (the list's own mass below 1 is that of words too rare for it), marks, boundaries.
_TOTAL = 1 + (sum(MARKS_PER_THOUSAND_WORDS.values()) + BOUNDARIES_PER_THOUSAND_WORDS) / 1000

_TOKEN = re.compile(
    r"<unk>"  # the mark that some corpora ship
    r"|\b[^\W\d_](?:\.[^\W\d_])+\b"  # u.s, e.g
    r"|\d+(?:[.,]\d+)+\w*"  # 0.0, 00,000, 0.00pm
    r"|\w+(?:'\w+)*"  # words, with inner apostrophes: don't
    r"|[^\w\s]\ufe0f?"  # any other mark, with an emoji's variation selector
)
_LONG_NUMBER = re.compile(r"\d[\d.,]*\d")
_DIGIT = re.compile(r"\d")
# Character for character: `prefix_bytes` takes positions in the result for positions in the text.
_STRAIGHT = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")


def public_word_frequencies() -> dict[str, float]:
    """Return the public probability of words and marks in running English text, most frequent first.

    Returns:
        Word -> probability; the rest to 1 is unlisted words and message boundaries. Takes 0.3 s.
    """
    from wordfreq import get_frequency_dict

    masses = {mark: count / 1000 for mark, count in MARKS_PER_THOUSAND_WORDS.items()}
    masses = {**get_frequency_dict("en", "large"), **masses}
    ranked = sorted(masses.items(), key=lambda item: (-item[1], item[0]))
    return {word: mass / _TOTAL for word, mass in ranked}


def boundary_frequency() -> float:
    """Return the public probability of a message boundary, on the scale of `public_word_frequencies`."""
    return BOUNDARIES_PER_THOUSAND_WORDS / 1000 / _TOTAL


@dataclass(frozen=True, eq=False)
class WordCodec:
    """Text <-> ids of a list of words; ids 0, 1, 2 are <pad>, <s>, <unk>.

    Not lossless: case, spacing, long numbers and unlisted words do not come back from `decode`.
    """

    words: Sequence[str]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Return the ids of a text (n,)."""
        ids, unknown = self._ids, SPECIALS.index("<unk>")
        tokens = [token.lower() for token in _TOKEN.findall(text.translate(_STRAIGHT))]
        # The list has long numbers only in their zeroed form, so only misses are tried again.
        found = (ids.get(token) or ids.get(_zero_long_numbers(token), unknown) for token in tokens)
        return np.fromiter(found, dtype=np.int32, count=len(tokens))

    def prefix_bytes(self, text: str, num_tokens: int) -> int:
        """Return the UTF-8 bytes of `text` up to the end of its token number `num_tokens` (from 1)."""
        matches = _TOKEN.finditer(text.translate(_STRAIGHT))
        end = next(match.end() for number, match in enumerate(matches, start=1) if number == num_tokens)
        return utf8_bytes(text[:end])

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Return the words of some ids, separated by spaces."""
        return " ".join(self.words[index] for index in ids)


def utf8_bytes(text: str) -> int:
    """Return the length of a text in UTF-8; a lone surrogate, which JSON can hold, counts three bytes."""
    return len(text.encode("utf-8", "surrogatepass"))


def _zero_long_numbers(token: str) -> str:
    return _LONG_NUMBER.sub(lambda number: _DIGIT.sub("0", number[0]), token)
