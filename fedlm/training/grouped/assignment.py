"""Which devices of a cohort train together: a function of the cohort alone, never of who trains it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedlm.config.schema import Config

STEP_TOKENS = 2048  # tokens of all devices in one step: more fill no product better, they only take memory
SMALLEST, SHARES = 4, 8  # a small cohort is cut into about so many groups, so that several workers have work


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
    largest = min(config.execution.group_size, max(SMALLEST, -(-len(order) // SHARES)))
    batch_tokens = config.local.batch_size * config.data.sequence_length
    groups = []
    start = 0
    while start < len(order):
        step_tokens = max(1, min(int(num_tokens[order[start]]), batch_tokens))
        size = min(largest, max(1, STEP_TOKENS // step_tokens))
        groups.append(order[start : start + size])
        start += size
    return groups
