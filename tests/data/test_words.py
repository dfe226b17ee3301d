"""Words are cut as wordfreq cuts them, and a cut message counts exactly the bytes of its kept tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlm.data.words import SPECIALS, WordCodec, boundary_frequency, public_word_frequencies

WORDS = (*SPECIALS, "don't", "u.s", "the", "cat", "0000", "0.0", "7", ".", ",", '"', "<", ">", "s", "é", "❤️")
# Characters at which the pattern changes its mind.
tricky = st.text(alphabet="aé'\u2019.,019 _<>-\u201c\ufe0f❤İ\u0301\n", max_size=30)


def ids_of(text: str) -> list[str]:
    codec = WordCodec(WORDS)
    return [WORDS[index] for index in codec.encode(text)]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The CAT.", ["the", "cat", "."]),
        ("don\u2019t, Don't", ["don't", ",", "don't"]),
        ("\u201cthe\u201d", ['"', "the", '"']),
        ("the U.S. cat.the", ["the", "u.s", ".", "cat", ".", "the"]),
        ("2018 3.5 7", ["0000", "0.0", "7"]),
        ("<unk> <s> dog", ["<unk>", "<", "s", ">", "<unk>"]),
        ("❤️é", ["❤️", "é"]),
        (" \t\n", []),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert ids_of(text) == tokens


@given(text=tricky)
def test_a_prefix_of_the_bytes_holds_exactly_the_tokens_counted(text: str) -> None:
    codec = WordCodec((*WORDS, "a", "'", "_", "-", "aa", "00"))
    ids = codec.encode(text).tolist()
    for number in range(1, len(ids) + 1):
        prefix = text.encode()[: codec.prefix_bytes(text, number)].decode()
        assert codec.encode(prefix).tolist() == ids[:number]


def test_nearly_every_public_word_is_one_token() -> None:
    masses = public_word_frequencies()
    words = list(masses)[:100_000]
    codec = WordCodec((*SPECIALS, *words))
    reached = [word for index, word in enumerate(words, start=len(SPECIALS)) if codec.encode(word).tolist() == [index]]
    # wordfreq keeps host names (bit.ly) and flags whole; in chat, "yes.no" would be glued by accident.
    assert sum(masses[word] for word in reached) > 0.9999 * sum(masses[word] for word in words)


def test_public_masses_leave_room_for_boundaries_and_unlisted_words() -> None:
    masses = public_word_frequencies()
    unlisted = 1 - sum(masses.values()) - boundary_frequency()
    assert 0 < unlisted < 0.02
    assert list(masses.values()) == sorted(masses.values(), reverse=True)
    assert {"the", ".", ",", "don't"} <= set(list(masses)[:200])
