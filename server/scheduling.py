"""Cuts a round's groups into pieces of work: large ones first, small ones last, so that all nodes end together.

Each piece takes a fixed share of what is left (guided self-scheduling, Polychronopoulos and Kuck 1987). Pieces are
whole groups, and which piece a group is in changes nothing but who trains it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

PIECES_PER_NODE = 4  # a node takes 1/4 of its even share of what is left
MAX_DEVICES = 256  # so that progress shows, and a lost piece is a small loss


def cut_pieces(
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
        one_each: As few pieces as nodes, of equal work: for nodes whose every reply carries a whole sum. More only
            where a piece would exceed `MAX_DEVICES` devices.
    """
    costs = np.array([float(num_tokens[group].sum() + len(group)) for group in groups])  # (K,)
    left = np.cumsum(costs[::-1])[::-1]  # (K,) work of this group and all later ones
    pieces: list[Sequence[npt.NDArray[np.int64]]] = []
    start = 0
    while start < len(groups):
        shares = max(num_nodes - len(pieces), 1) if one_each else PIECES_PER_NODE * num_nodes
        most, devices, end = left[start] / shares * (1 + 1e-9), len(groups[start]), start + 1
        while end < len(groups) and costs[start : end + 1].sum() <= most and devices + len(groups[end]) <= MAX_DEVICES:
            devices += len(groups[end])
            end += 1
        pieces.append(groups[start:end])
        start = end
    return pieces
