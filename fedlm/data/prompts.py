"""Examples of a language model as next-token predictions: a text, a prompt with its answer, a window of a long text.

    one column    <s> text <s>                   every token but the first is a target
    two columns   <s> prompt => answer <s>       the answer's tokens and the last <s> are targets, the prompt is read
    .tokens       windows of T + 1 tokens that share one, so every token is a target once

Longer examples are cut at the end. Legend: n examples, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedlm.data.batching import Batch, sequences
from fedlm.data.examples import TextRows, kind_of, read_rows, read_stream
from fedlm.data.vocabulary import Vocabulary

SEPARATOR = " =>"

Ids = npt.NDArray[np.int32]


def read_language_examples(
    path: Path, columns: Sequence[str], vocabulary: Vocabulary, max_length: int
) -> tuple[Batch, TextRows | None]:
    """Read a file as examples of a language model.

    Arguments:
        path: Any form of `fedlm.data.examples`.
        columns: The columns of text, as in `read_rows`.
        vocabulary: Text to ids.
        max_length: T, inputs of an example at most.

    Returns:
        A row for each example, (n, T), and the texts; None for a running text.

    Raises:
        DataError: As `read_rows` and `read_stream`.
    """
    if kind_of(path) == ".tokens":
        lines = chain.from_iterable((vocabulary.encode(line), [vocabulary.boundary_id]) for line in read_stream(path))
        return sequences(np.concatenate([[vocabulary.boundary_id], *lines]), max_length), None
    rows = read_rows(path, columns)
    return language_batch(rows, vocabulary, max_length), rows


def language_batch(rows: TextRows, vocabulary: Vocabulary, max_length: int) -> Batch:
    """Return texts, or prompts with answers, as one stack of predictions (n, T), cut to the longest."""
    pairs = [_parts(texts, vocabulary) for texts in rows.texts]
    length = min(max_length, max(len(prompt) + len(answer) for prompt, answer in pairs) - 1)
    tokens = np.zeros((len(pairs), length + 1), np.int64)  # (n, T + 1)
    starts = np.array([len(prompt) for prompt, _ in pairs])  # (n,)
    ends = np.array([min(len(prompt) + len(answer), length + 1) for prompt, answer in pairs])  # (n,)
    for row, (prompt, answer) in enumerate(pairs):
        tokens[row, : ends[row]] = np.concatenate([prompt, answer])[: ends[row]]
    position = np.arange(length)  # (T,)
    present = position < ends[:, None] - 1  # (n, T)
    mask = present & (position >= starts[:, None] - 1)  # (n, T)
    return Batch(np.where(present, tokens[:, :-1], 0), np.where(mask, tokens[:, 1:], 0), mask, present)


def prompt_ids(prompt: str, vocabulary: Vocabulary) -> Ids:
    """Return what a model reads before it answers, (n,)."""
    return np.concatenate([[vocabulary.boundary_id], vocabulary.encode(prompt + SEPARATOR)]).astype(np.int32)


def _parts(texts: tuple[str, ...], vocabulary: Vocabulary) -> tuple[Ids, Ids]:
    """Return the ids that are read alone, and those that are predicted."""
    end = [vocabulary.boundary_id]
    if len(texts) == 1:
        return np.array(end, np.int32), np.concatenate([vocabulary.encode(texts[0]), end])
    prompt, answer = texts
    return prompt_ids(prompt, vocabulary), np.concatenate([vocabulary.encode(f" {answer.strip()}"), end])
