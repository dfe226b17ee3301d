"""Vocabularies are public, complete and the same in every process."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fedlm.config.schema import Config, DataConfig, VocabularyConfig
from fedlm.data.vocabulary import Vocabulary, vocabulary_from_tokenizer
from fedlm.data.vocabulary_source import load_vocabulary
from fedlm.data.words import public_word_frequencies
from fedlm.errors import DataError

SENTENCES = ["the cat sat on the mat", "The dog doesn't like the cat.", "naïve café", "1, 2, 3!"] * 5


def vocabulary(source: str, size: int, corpus: str = "chitchat") -> Vocabulary:
    config = Config(data=DataConfig(corpus=corpus), vocabulary=VocabularyConfig(source=source, size=size))
    return load_vocabulary(config)


def byte_level_tokenizer(specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def loaded() -> Vocabulary:
    """A vocabulary of bytes and a few merges."""
    return vocabulary_from_tokenizer(byte_level_tokenizer(["<s>"]), 320)


@pytest.mark.parametrize(
    ("source", "size", "corpus"),
    [
        ("wordfreq", 30_000, "chitchat"),
        ("wordfreq", 150_000, "x"),
        ("wordfreq", 16, "x"),
        ("wordfreq", 5_000, "synthetic"),
    ],
)
def test_frequencies_are_a_positive_law_by_falling_rank(source: str, size: int, corpus: str) -> None:
    loaded = vocabulary(source, size, corpus)
    assert loaded.size == size == len(loaded.frequencies)
    assert (loaded.frequencies > 0).all()
    assert loaded.frequencies.sum() == pytest.approx(1, abs=1e-12)
    assert (np.diff(loaded.frequencies[3:]) <= 0).all()
    with pytest.raises(ValueError, match="read-only"):
        loaded.frequencies[0] = 1


def test_a_smaller_vocabulary_is_a_prefix_whose_rest_is_unknown() -> None:
    small, large = vocabulary("wordfreq", 1_000), vocabulary("wordfreq", 20_000)
    text = "The cat sat on the mat, quietly; nevertheless it was 42!"
    expected = [index if index < small.size else small.unknown_id for index in large.encode(text)]
    assert small.encode(text).tolist() == expected
    assert small.frequencies[small.unknown_id] == pytest.approx(
        large.frequencies[large.unknown_id] + large.frequencies[small.size :].sum()
    )
    np.testing.assert_allclose(small.frequencies[3:], large.frequencies[3 : small.size])


def test_too_large_a_vocabulary_states_the_largest() -> None:
    with pytest.raises(DataError, match=r"wordfreq has 3[0-9]{2},[0-9]{3} entries") as caught:
        vocabulary("wordfreq", 2_000_000)
    largest = int(str(caught.value).split("wordfreq has ")[1].split()[0].replace(",", ""))
    assert vocabulary("wordfreq", largest).size == largest
    with pytest.raises(DataError):
        vocabulary("wordfreq", largest + 1)


def test_decode_and_encode_agree_on_words() -> None:
    loaded = vocabulary("wordfreq", 30_000)
    ids = loaded.encode("don't tell the cat , it is 0000")
    assert loaded.decode(ids) == "don't tell the cat , it is 0000"


def test_pickling_keeps_ids_and_digest() -> None:
    loaded = vocabulary("wordfreq", 1_000)
    copy = pickle.loads(pickle.dumps(loaded))
    assert copy.digest == loaded.digest
    assert copy.encode("the cat").tolist() == loaded.encode("the cat").tolist()


def test_the_digest_is_the_same_in_another_process_and_differs_between_vocabularies() -> None:
    program = (
        "from fedlm.config.schema import Config, VocabularyConfig\n"
        "from fedlm.data.vocabulary_source import load_vocabulary\n"
        "print(load_vocabulary(Config(vocabulary=VocabularyConfig(size=1000))).digest)"
    )
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == vocabulary("wordfreq", 1_000).digest
    assert vocabulary("wordfreq", 1_001).digest != vocabulary("wordfreq", 1_000).digest


def test_a_message_counts_the_bytes_of_what_is_kept() -> None:
    loaded = vocabulary("wordfreq", 1_000)
    text = "  the café is “open”  "
    ids, num_bytes = loaded.encode_with_bytes(text, 100)
    assert (len(ids), num_bytes) == (6, len(text.encode()))
    ids, num_bytes = loaded.encode_with_bytes(text, 2)
    assert (len(ids), num_bytes) == (2, len("  the café".encode()))
    assert loaded.encode_with_bytes(text, 0)[1] == 0


def test_a_tokenizer_file_is_a_vocabulary(tmp_path: Path) -> None:
    tokenizer, path = byte_level_tokenizer(["<pad>", "<s>", "<unk>"]), tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    size = tokenizer.get_vocab_size()
    loaded = vocabulary(str(path), size)
    assert (loaded.pad_id, loaded.boundary_id, loaded.unknown_id) == (0, 1, 2)
    text = "The naïve cat doesn't sit 🙂"
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.frequencies > 0).all()
    assert loaded.frequencies.sum() == pytest.approx(1, abs=1e-12)
    with pytest.raises(DataError, match=f"has {size} entries; set the size to {size}"):
        vocabulary(str(path), size + 1)
    with pytest.raises(DataError, match=f"has {size} entries"):
        vocabulary(str(path), size - 1)


def test_subword_frequencies_are_those_of_public_text(loaded: Vocabulary) -> None:
    masses = public_word_frequencies()
    words, law = list(masses), np.array(list(masses.values()))
    drawn = np.random.default_rng(0).choice(len(words), 20_000, p=law / law.sum())
    text = "".join(f" {words[index]}" if words[index][0].isalpha() else words[index] for index in drawn)
    counts = np.bincount(loaded.encode(text), minlength=320)  # (V,)
    distance = 0.5 * np.abs(counts / counts.sum() - loaded.frequencies).sum()
    # Capitals, boundaries and the floor move 5 % of the mass on purpose, the draw 2 %.
    assert distance < 0.1


def test_a_cut_subword_message_counts_the_bytes_up_to_its_last_token(loaded: Vocabulary) -> None:
    text = "the cat doesn't like the naïve dog"
    ids = loaded.encode(text)
    for kept in range(1, len(ids)):
        cut, num_bytes = loaded.encode_with_bytes(text, kept)
        covered = loaded.decode(cut)
        # Two tokens share the letter of two bytes; it counts whole with the first.
        assert num_bytes == len(covered.replace("\ufffd", "ï").encode())


def test_a_lone_surrogate_is_a_character_like_any_other(loaded: Vocabulary) -> None:
    for one in (loaded, vocabulary("wordfreq", 1_000)):
        ids, num_bytes = one.encode_with_bytes("the \ud800 cat", 50)
        assert len(ids) == len(one.encode("the ? cat"))
        assert num_bytes == len("the  cat") + 3


def test_the_table_of_a_model_may_be_padded_but_not_too_small() -> None:
    tokenizer = byte_level_tokenizer(["<|endoftext|>"])
    size = tokenizer.get_vocab_size()
    padded = vocabulary_from_tokenizer(tokenizer, size + 64)
    assert padded.size == size + 64
    assert padded.boundary_id == padded.pad_id == padded.unknown_id == tokenizer.token_to_id("<|endoftext|>")
    assert vocabulary_from_tokenizer(tokenizer, size, boundary_id=5).boundary_id == 5
    with pytest.raises(DataError, match=f"cannot hold the tokenizer's {size} entries"):
        vocabulary_from_tokenizer(tokenizer, size - 1)


def test_a_tokenizer_without_a_boundary_is_refused() -> None:
    with pytest.raises(DataError, match="no token to separate messages"):
        vocabulary_from_tokenizer(byte_level_tokenizer([]), 320)


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no vocabulary 'nowhere\.json'"):
        vocabulary("nowhere.json", 1_000)
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json file"):
        vocabulary(str(broken), 1_000)
    config = replace(Config(), vocabulary=VocabularyConfig(source="model"))
    with pytest.raises(DataError, match=r"needs a pretrained model, but model\.name is 'transformer'"):
        load_vocabulary(config)
