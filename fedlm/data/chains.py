"""Laws of words and Markov chains of classes: the mathematics of the synthetic corpus.

Legend: W words, C classes. Laws are probability vectors; entropies are in nats.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from fedlm.errors import DataError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def zipf_mandelbrot(num_words: int, exponent: float, shift: float) -> Floats:
    """Return the probabilities of words by rank, (W,), descending."""
    masses = (np.arange(1, num_words + 1, dtype=np.float64) + shift) ** -exponent  # (W,)
    law: Floats = masses / masses.sum()
    return law


def balanced_classes(word_law: Floats, num_classes: int) -> Ints:
    """Give each word, most frequent first, to the lightest class so far, (W,); no class stays empty."""
    heap = [(0.0, index) for index in range(num_classes)]
    classes = np.empty(len(word_law), dtype=np.int64)
    for word, mass in enumerate(word_law.tolist()):
        total, classes[word] = heap[0]
        heapq.heapreplace(heap, (total + mass, int(classes[word])))
    return classes


def balanced_transition(logits: Floats, law: Floats) -> Floats:
    """Return the stochastic matrix (C, C) with stationary law `law` (C,) that is nearest to exp(logits).

    Sinkhorn's algorithm scales rows and columns of exp(logits) in turn until both sum to `law`.
    """
    kernel = np.exp(logits - logits.max())  # (C, C)
    columns = np.ones(len(law))  # (C,)
    with np.errstate(all="ignore"):  # an affinity of 0 gives NaN, which never converges
        for _ in range(10_000):
            rows = law / (kernel @ columns)  # (C,)
            previous, columns = columns, law / (kernel.T @ rows)
            change = np.abs(np.log(columns / previous)).max()
            if not change > 1e-13:
                break
    if not change <= 1e-13:
        raise DataError("the synthetic corpus does not balance; lower synthetic.temperature")
    joint = rows[:, None] * kernel * columns  # (C, C)
    transition: Floats = joint / joint.sum(axis=1, keepdims=True)
    return transition


def stationary_map(transition: Floats, law: Floats, weight: float) -> Floats:
    """Return the matrix (C, C) that takes theta to T's stationary law: (1 - lambda) (I - lambda A)^-1."""
    if weight == 1:
        return np.tile(law, (len(law), 1))  # its limit
    inverse = np.linalg.inv(np.eye(len(law)) - weight * transition).astype(np.float64, copy=False)
    return (1 - weight) * inverse


def class_sums(classes: Ints, values: Floats) -> Floats:
    """Sum values of words (W,) by class, (C,)."""
    return np.bincount(classes, values).astype(np.float64, copy=False)


def entropy(law: Floats) -> float:
    """Return -sum p log p of a law of any shape, with 0 log 0 = 0."""
    positive = law[law > 0]
    return float(-(positive * np.log(positive)).sum())


def row_entropies(rows: Floats) -> Floats:
    """Return -sum_j p_ij log p_ij of each row, (C,)."""
    logs = np.log(rows, where=rows > 0, out=np.zeros_like(rows))  # (C, C)
    sums: Floats = np.einsum("ij,ij->i", rows, logs)  # (C,)
    return -sums


def rows_end_to_end(rows: Floats) -> Floats:
    """Return the cumulative sums of stochastic rows (R, C), row r shifted to [r, r + 1], as (R * C,)."""
    cumulative: Floats = np.cumsum(rows, axis=1)  # (R, C)
    cumulative /= cumulative[:, -1:]
    return (cumulative + np.arange(len(rows))[:, None]).reshape(-1)


def pick(end_to_end: Floats, row: Ints, uniform: Floats, num_classes: int) -> Ints:
    """Draw a column of each given row, by inversion: one binary search for all.

    Arguments:
        end_to_end: (R * C,) from `rows_end_to_end`.
        row: (U,) rows to draw from.
        uniform: (U,) in [0, 1).
        num_classes: C.
    """
    found = np.searchsorted(end_to_end, row + uniform, side="right") - row * num_classes
    picked: Ints = np.clip(found, 0, num_classes - 1)
    return picked
