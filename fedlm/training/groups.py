"""Which devices of a cohort train together: a function of the cohort alone, never of who trains it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedlm.config.schema import Config


def group_devices(num_tokens: npt.NDArray[np.int64], config: Config) -> list[npt.NDArray[np.int64]]:
    """Cut a cohort into groups of devices with about as much data, those with the most first.

    Batched arithmetic rounds differently in another group, so the groups must not depend on the number of nodes.

    Arguments:
        num_tokens: Tokens of each device of the cohort (U,).
        config: Its `execution.group_size` bounds the groups.

    Returns:
        Positions in the cohort, each once.
    """
    order = np.argsort(-num_tokens, kind="stable")  # (U,)
    size = config.execution.group_size
    return [order[start : start + size] for start in range(0, len(order), size)]
