"""What leaves a round: the noised mean update, the noised answers, and how noisy they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlm.trainable.spec import UpdateSpec, Vector

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Release:
    """All that leaves the devices of one round; whatever is computed from it costs no privacy.

    Arguments:
        spec: The coordinates that were sent.
        mean: (P,) the sum of the clipped updates, noised, divided by the expected cohort; a strategy may write into it.
        answers: Of each side query by its name, (size,): the noised mean over the expected cohort in its own units.
        noise_std: Standard deviation of the noise in a coordinate of `mean`, in a group of scale 1; 0 without noise.
    """

    spec: UpdateSpec
    mean: Vector
    answers: Mapping[str, Floats]
    noise_std: float
