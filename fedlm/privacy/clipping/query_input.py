"""What queries beside the update may look at on a device."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.int64]
NO_WORDS: Words = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class DeviceStats:
    """What a device knows of its own training beside the update: private, and only ever seen by side queries.

    Arguments:
        loss: Mean training loss.
        num_tokens: Targets trained on.
        words: (W,) distinct ids of the words it has.
    """

    loss: float = 0.0
    num_tokens: int = 0
    words: Words = field(default_factory=lambda: NO_WORDS)


@dataclass(frozen=True, eq=False)
class QueryInput:
    """What a side query may look at.

    Arguments:
        norm: |y|, the norm that the clip saw.
        clip_norm: C.
        group_squares: (G,) |y_g|^2 of each group.
        device_stats: Of the device.
    """

    norm: float
    clip_norm: float
    group_squares: Floats
    device_stats: DeviceStats
