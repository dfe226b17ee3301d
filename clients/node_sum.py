"""The exact sum that a node keeps over its work items of a round, until the server asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from fedlm.codec import from_text
from fedlm.messages import PartialSum, TrainRequest
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.clipping.clipped_sum import ClippedSum, new_sum

EMPTY = np.empty(0, np.int64)


class NodeSum:
    """One node's partial sum; it never holds a part of a work item."""

    def __init__(self) -> None:
        self._name = ""
        self._work_items: list[int] = []
        self._total: ClippedSum | None = None

    @contextmanager
    def work_item(self, request: TrainRequest, size: int) -> Iterator[ClippedSum]:
        """Open the sum for the devices of one work item; an exception inside drops the whole sum.

        Arguments:
            request: Its `sum_name` decides whether the work item joins what is held or begins a new sum.
            size: Coordinates P.
        """
        if self._total is None or request.sum_name != self._name:
            self._drop()  # before the new one is made: two would be twice the memory
            clip_spec = from_text(ClipSpec, request.clip_spec, where="clip spec of the request")
            self._name, self._total = request.sum_name, new_sum(clip_spec, size)
        try:
            yield self._total
        except BaseException:
            self._drop()
            raise
        self._work_items.append(request.work_item)

    def flush(self, name: str) -> PartialSum:
        """Return the sum of this name, empty when there is none, and hold nothing any more."""
        if self._total is None or name != self._name:
            self._drop()
            return PartialSum(EMPTY, EMPTY, 0)
        vector, fields = self._total.to_arrays()
        partial = PartialSum(np.array(self._work_items, np.int64), vector, int(fields["num_devices"]))
        self._drop()
        return partial

    def _drop(self) -> None:
        self._name, self._work_items, self._total = "", [], None
