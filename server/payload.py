"""What a device downloads: everything that changed since it last took part.

The base is on the device already, by content hash, and is not counted. A device that takes part in round t needs the
whole fixed part of the vector, every embedding row that changed since its last visit (asking only for the rows of its
own words would tell the server which words they are), and the ids of the round's row set.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedlm.trainable.spec import RowIds, UpdateSpec


class DownloadMeter:
    """Counts the bytes that each device downloads.

    Arguments:
        spec: The full spec.
        fleet_size: Number of devices, N.
        num_rounds: Rounds of the run, T.
    """

    def __init__(self, spec: UpdateSpec, fleet_size: int, num_rounds: int) -> None:
        self._fixed_bytes = 4 * spec.fixed_size
        self._row_bytes = 4 * (spec.row_size + 1)  # values and the row's id
        num_rows = spec.row_blocks[0].shape[0] if spec.row_blocks else 0
        self._changed = np.zeros(num_rows, np.int64)  # (V,) round that last changed the row
        self._rows_by_round = np.zeros(num_rounds + 1, np.int64)  # (T+1,) rows last changed in each round
        self._rows_by_round[0] = num_rows
        self._version = np.zeros(fleet_size, np.int32)  # (N,) rounds applied to the device's copy

    def download(self, devices: RowIds, row_ids: RowIds) -> npt.NDArray[np.int64]:
        """Return the bytes (U,) that each of these devices would download for a round with these rows."""
        newer = np.cumsum(self._rows_by_round[::-1])[::-1]  # (T+1,) rows changed in this round or later
        rows = np.append(newer, 0)[self._version[devices] + 1]  # (U,)
        return self._fixed_bytes + self._row_bytes * rows + 4 * len(row_ids)

    def visited(self, devices: RowIds, round_number: int) -> None:
        """Remember that these devices have downloaded what this round needs."""
        self._version[devices] = round_number - 1

    def changed(self, row_ids: RowIds, round_number: int) -> None:
        """Record that the server changed these rows in this round."""
        if len(self._changed):
            np.subtract.at(self._rows_by_round, self._changed[row_ids], 1)
            self._changed[row_ids] = round_number
            self._rows_by_round[round_number] += len(row_ids)
