"""The fixed point of clipped updates: int64 vectors in units of clip norm * 2^-40
(`fedlm.privacy.clipping.clipped_sum`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FRACTION_BITS = 40
UNITS = 2.0**FRACTION_BITS
"""The clip norm in units."""

CAPACITY = 2**22
"""Devices that one sum can hold without overflow."""

CAPACITY_UNCLIPPED = 2**16
"""The same without clipping, where a coordinate can be 64 (in units of 2^-40)."""

IntVector = npt.NDArray[np.int64]
FloatVector = npt.NDArray[np.float32]
