"""Which rows of the embedding tables a device touches, in expectation, and the memory pages that they lie on.

A base is mapped from its file, so a page of it is resident only once one of its rows is read (then with its neighbours,
which Linux maps along) or written (then as a private copy). Words are taken as independent draws from the public
frequencies; real text repeats itself more, and touches a little less.

Legend: V vocabulary, S rows of the round's set.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedlm.config.schema import RowsConfig
from fedlm.trainable.rows import sampler_of

Floats = npt.NDArray[np.float64]

PAGE = 4096
FAULT_AROUND = 16 * PAGE  # Linux maps the pages around one that is read, when they are in its cache


def word_probabilities(frequencies: Floats, noise: Floats, num_words: float, num_steps: float) -> Floats:
    """Return the probability (V,) that a row is in play.

    Arguments:
        frequencies: Of the words (V,), sum 1.
        noise: Expected count of each word among the negatives of one step (V,).
        num_words: Tokens of the device.
        num_steps: Steps that draw negatives.
    """
    with np.errstate(divide="ignore"):
        log_missed = num_words * np.log1p(-np.minimum(frequencies, 1)) - num_steps * noise  # (V,)
    return -np.expm1(log_missed)


def received_probabilities(rows: RowsConfig, frequencies: Floats, num_patches: float) -> Floats:
    """Return the probability (V,) that the server has sent a row's new values in one of `num_patches` rounds."""
    size = len(frequencies)
    if not rows.count or not num_patches:
        return np.zeros(size)
    return sampler_of(rows).received(frequencies, rows.count, num_patches)


def touched_blocks(probabilities: Floats, row_bytes: int, block_bytes: int) -> Floats:
    """Return the probability that each block of memory holds a touched row.

    Arguments:
        probabilities: Of each row (R,); rows lie one after another.
        row_bytes: Bytes of a row.
        block_bytes: Bytes of a block.
    """
    offset = row_bytes // 2  # what stands before the table is no multiple of anything: some rows lie on two blocks
    num_blocks = -(-(len(probabilities) * row_bytes + offset) // block_bytes)
    log_untouched = np.log1p(-np.minimum(probabilities, 1 - 1e-12))  # (R,)
    starts = np.arange(len(probabilities)) * row_bytes + offset  # (R,)
    first, last = starts // block_bytes, (starts + row_bytes - 1) // block_bytes
    missed = np.bincount(first, log_untouched, num_blocks + 1)
    for ahead in range(1, int((last - first).max(initial=0)) + 1):  # rows that reach into further blocks
        reaching = last - first >= ahead
        missed += np.bincount(first[reaching] + ahead, log_untouched[reaching], num_blocks + 1)
    return -np.expm1(missed[:num_blocks])
