"""What a device downloads: everything that changed since it last took part.

The base is on the device already, by content hash, and is not counted. A device that takes part in round t needs every
block outside the tables that changed since its last visit (all of them at its first), every embedding row that did
(asking only for the rows of its own words would tell the server which words they are), and the ids of the round's row
set.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedlm.trainable.spec import RowIds, UpdateSpec

Counts = npt.NDArray[np.int64]


class DownloadMeter:
    """Counts the bytes that each device downloads.

    Arguments:
        spec: Every block that the server may change.
        fleet_size: Number of devices, N.
        num_rounds: Rounds of the run, T.
    """

    def __init__(self, spec: UpdateSpec, fleet_size: int, num_rounds: int) -> None:
        self._row_bytes = 4 * (spec.row_size + 1)  # values and the row's id
        num_rows = spec.row_blocks[0].shape[0] if spec.row_blocks else 0
        self._changed = np.zeros(num_rows, np.int64)  # (V,) round that last changed the row
        self._rows_by_round = np.zeros(num_rounds + 1, np.int64)  # (T+1,) rows last changed in each round
        self._rows_by_round[0] = num_rows
        self._block_changed = {block.name: 0 for block in spec.blocks if block.kind != "rows"}
        self._fixed_by_round = np.zeros(num_rounds + 1, np.int64)  # (T+1,) bytes of the other blocks, likewise
        self._fixed_by_round[0] = 4 * spec.fixed_size
        self._version = np.full(fleet_size, -1, np.int32)  # (N,) rounds applied to the device's copy; -1: has none

    def download(self, devices: RowIds, spec: UpdateSpec) -> Counts:
        """Return the bytes (U,) that each of these devices would download for a round in which this spec moves."""
        version = self._version[devices].astype(np.int64)  # (U,)
        fixed = _later(self._fixed_by_round)[version + 1]
        rows = _later(self._rows_by_round)[np.maximum(version, 0) + 1]
        num_ids = len(spec.row_ids) if spec.row_ids is not None else 0
        return np.asarray(fixed + self._row_bytes * rows + 4 * num_ids)

    def visited(self, devices: RowIds, round_number: int) -> None:
        """Remember that these devices have downloaded what this round needs."""
        self._version[devices] = round_number - 1

    def changed(self, spec: UpdateSpec, round_number: int) -> None:
        """Record that the server changed these blocks, of the tables these rows, in this round."""
        for block in spec.blocks:
            if block.kind != "rows":
                self._fixed_by_round[self._block_changed[block.name]] -= 4 * block.size
                self._fixed_by_round[round_number] += 4 * block.size
                self._block_changed[block.name] = round_number
        if spec.row_blocks and spec.row_ids is not None:
            np.subtract.at(self._rows_by_round, self._changed[spec.row_ids], 1)
            self._changed[spec.row_ids] = round_number
            self._rows_by_round[round_number] += len(spec.row_ids)


def _later(by_round: Counts) -> Counts:
    """Return for each round (T+2,) what last changed in it or later."""
    return np.append(np.cumsum(by_round[::-1])[::-1], 0)
