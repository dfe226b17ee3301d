"""Readers of examples: each form gives the same records, each defect one line that names its place."""

from __future__ import annotations

import csv
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlm.data.examples import read_rows, read_stream
from fedlm.data.prompts import SEPARATOR, language_batch, prompt_ids, read_language_examples
from fedlm.data.vocabulary import Vocabulary, vocabulary_from_words
from fedlm.errors import DataError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
WORDS = ("=", ">", "a", "b", "c", "d", "e", "f", "g", "h")


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return vocabulary_from_words(WORDS, np.full(len(WORDS) + 3, 1.0), "test")


def test_every_form_gives_the_same_examples(tmp_path: Path) -> None:
    texts, labels = ['say "hi", he said', "plain", "ünïcode ; x"], [1, 0, 2]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("sentence", "label"), *zip(texts, labels, strict=True)])
    lines = "".join(f"{text}\t{label}\n" for text, label in zip(texts, labels, strict=True))
    (tmp_path / "a.tsv").write_text(f"sentence\tlabel\n{lines}")
    records = [{"sentence": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n\n" for record in records))
    (tmp_path / "a.csv.xz").write_bytes(lzma.compress((tmp_path / "a.csv").read_bytes()))
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.csv.xz"):
        rows = read_rows(tmp_path / name, (), "label")
        assert [text for (text,) in rows.texts] == texts, name
        assert rows.labels == labels
        assert rows.columns == ("sentence",)
    (tmp_path / "a.txt").write_text("\n".join(["", *texts, ""]))
    assert [text for (text,) in read_rows(tmp_path / "a.txt").texts] == texts


def test_a_quotation_mark_in_a_tsv_file_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('sentence\tlabel\n"open\t1\nclose"\t0\n')
    assert read_rows(tmp_path / "a.tsv", (), "label").texts == [('"open',), ('close"',)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "sentence,label\nx,1\ny,positive\n", "line 3: 'label' is 'positive', must be a whole number"),
        ("a.csv", "sentence,label\nx,-1\n", "line 2: 'label' is '-1'"),
        ("a.csv", "sentence,label\nx,1\ny\n", "line 3: 1 fields, but the header has 2"),
        ("a.csv", 'sentence,label\n"x,1\n', "line 2: unexpected end of data"),
        ("a.csv", "sentence,label\n", "has no example"),
        ("a.csv", "", "has no example"),
        ("a.csv", "a,a,label\nx,y,1\n", "line 1: the header"),
        ("a.csv", "sentence\nx\n", "no column 'label'; it has sentence: set finetune.label"),
        ("a.csv", "a,b,c,label\nx,y,z,1\n", "say which are text in finetune.columns"),
        ("a.jsonl", '{"sentence": "x", "label": 1}\n{"sentence": 3, "label": 1}\n', "line 2: 'sentence' is 3"),
        ("a.jsonl", '{"sentence": "x", "label": 1}\n{"sentence"\n', "line 2: not JSON"),
        ("a.jsonl", '{"sentence": "x", "label": true}\n', "line 1: 'label' is True"),
        ("a.jsonl", "[1]\n", "line 1: list, must be an object"),
        ("a.tokens", "x\n", "one running text"),
        ("a.pdf", "x\n", "must end in .csv"),
        ("a.csv.xz", "no archive", "damaged xz data"),
    ],
)
def test_a_defect_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name, (), "label")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_keys(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"finetune\.train"):
        read_rows(tmp_path / "no.csv")


words = st.lists(st.sampled_from(WORDS[2:]), min_size=0, max_size=6).map(" ".join)


@settings(deadline=None)
@given(pairs=st.lists(st.tuples(words, words), min_size=1, max_size=4), max_length=st.integers(2, 12))
def test_prompts_are_read_and_answers_predicted(
    vocabulary: Vocabulary, pairs: list[tuple[str, str]], max_length: int
) -> None:
    from fedlm.data.examples import TextRows

    batch = language_batch(TextRows(("mr", "ref"), pairs), vocabulary, max_length)
    end = vocabulary.boundary_id
    for row, (prompt, answer) in enumerate(pairs):
        before = [end, *vocabulary.encode(prompt + SEPARATOR)]
        whole = [*before, *vocabulary.encode(answer), end][: max_length + 1]
        n = len(whole) - 1
        assert batch.inputs[row, :n].tolist() == whole[:-1]
        assert batch.read[row].tolist() == [i < n for i in range(batch.inputs.shape[1])]
        assert batch.targets[row][batch.mask[row]].tolist() == whole[len(before) :]
        assert not batch.inputs[row, n:].any()
    assert np.array_equal(prompt_ids(pairs[0][0], vocabulary), [end, *vocabulary.encode(pairs[0][0] + SEPARATOR)])
    some = batch.select(np.array([0]))  # cut to what is read, not to what counts
    assert some.inputs.shape[1] == batch.read[0].sum()


def test_a_running_text_becomes_windows_that_lose_no_target(tmp_path: Path, vocabulary: Vocabulary) -> None:
    (tmp_path / "a.tokens").write_text(" a b c \n\n d e f g \n")
    batch, rows = read_language_examples(tmp_path / "a.tokens", (), vocabulary, 4)
    end = vocabulary.boundary_id
    stream = [*vocabulary.encode("a b c"), end, *vocabulary.encode("d e f g"), end]
    assert rows is None
    assert batch.targets[batch.mask].tolist() == stream
    assert read_stream(tmp_path / "a.tokens") == ["a b c", "d e f g"]


@pytest.mark.parametrize(
    ("name", "label", "count", "columns"),
    [
        ("sst2/train.tsv.xz", "label", 67_349, ("sentence",)),
        ("sst2/dev.tsv.xz", "label", 872, ("sentence",)),
        ("e2e/trainset.csv.xz", None, 42_061, ("mr", "ref")),
        ("e2e/testset_w_refs.csv.xz", None, 4_693, ("mr", "ref")),
    ],
)
def test_real_files_are_read_whole(name: str, label: str | None, count: int, columns: tuple[str, ...]) -> None:
    if not (DATA / name).is_file():
        pytest.skip(f"no {name} beside this project")
    rows = read_rows(DATA / name, (), label)
    assert (len(rows), rows.columns) == (count, columns)
    if name == "sst2/train.tsv.xz":
        assert sum(rows.labels or ()) == 37_569
