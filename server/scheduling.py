"""Cuts a round's groups into work items: large ones first, small ones last, so that all nodes end together.

Each work item takes a fixed share of what is left (guided self-scheduling, Polychronopoulos and Kuck 1987). Work items
are whole groups, and which work item a group is in changes nothing but who trains it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WORK_ITEMS_PER_NODE = 4  # a node takes 1/4 of its even share of what is left
MAX_DEVICES = 256  # so that progress shows, and a lost work item is a small loss


def cut_work_items(
    num_tokens: npt.NDArray[np.int64],
    groups: Sequence[npt.NDArray[np.int64]],
    *,
    num_nodes: int,
    one_each: bool,
) -> list[Sequence[npt.NDArray[np.int64]]]:
    """Return runs of consecutive groups, in order.

    Arguments:
        num_tokens: (U,) tokens of each device, the measure of its work.
        groups: Positions in `num_tokens`, largest devices first.
        num_nodes: Nodes that share the work.
        one_each: As few work items as nodes, of equal work: for nodes whose every reply carries a whole sum. More only
            where a work item would exceed `MAX_DEVICES` devices.
    """
    costs = np.array([float(num_tokens[group].sum() + len(group)) for group in groups])  # (K,)
    left = np.cumsum(costs[::-1])[::-1]  # (K,) work of this group and all later ones
    work_items: list[Sequence[npt.NDArray[np.int64]]] = []
    start = 0
    while start < len(groups):
        shares = max(num_nodes - len(work_items), 1) if one_each else WORK_ITEMS_PER_NODE * num_nodes
        most, devices, end = left[start] / shares * (1 + 1e-9), len(groups[start]), start + 1
        while end < len(groups) and costs[start : end + 1].sum() <= most and devices + len(groups[end]) <= MAX_DEVICES:
            devices += len(groups[end])
            end += 1
        work_items.append(groups[start:end])
        start = end
    return work_items
