"""The nodes that a run gives work to: those of its grid whose replies could be used."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from flwr.serverapp import Grid

from fedlm.errors import WorkerError

MAX_REFUSED = 3
"""Replies of one node that may be refused before the node is left out of the run."""


class Nodes:
    """The nodes of a grid, without those that are left out.

    A node that was left out stays so until the server is started again: a resumed run asks everybody again.

    Arguments:
        grid: Any Flower grid.
        timeout_s: Time for a first node to join.
    """

    def __init__(self, grid: Grid, timeout_s: float) -> None:
        self.grid, self.timeout_s = grid, timeout_s
        self._refused: Counter[int] = Counter()  # replies, by node
        self._last = ""
        self._events: list[dict[str, Any]] = []

    @property
    def remember(self) -> bool:
        """Whether a node of this grid is one process from message to message; Flower's own may be new each time.

        A grid says so itself (`nodes_remember = True`); elsewhere each reply carries its sum.
        """
        return bool(getattr(self.grid, "nodes_remember", False))

    def is_left_out(self, node: int) -> bool:
        """Tell whether the node gets no more work."""
        return self._refused[node] >= MAX_REFUSED

    def wait(self) -> list[int]:
        """Return the ids of the nodes that may get work, waiting for the first one until the time-out.

        Raises:
            WorkerError: None came, or all that there can be are left out.
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            joined = sorted(self.grid.get_node_ids())
            if nodes := [node for node in joined if not self.is_left_out(node)]:
                return nodes
            # A grid of processes that it starts itself gets no others.
            if time.monotonic() > deadline or (joined and self.remember):
                raise WorkerError(self._nobody())
            time.sleep(0.2)

    def refuse(self, node: int, reason: str) -> str:
        """Count a reply that could not be used; returns what to say of it.

        Arguments:
            node: Who sent it.
            reason: What is wrong with it, one line.
        """
        self._refused[node] += 1
        self._last = f"node {node}: {reason}"
        said = f"node {node} sent a reply that cannot be used: {reason}"
        if self._refused[node] != MAX_REFUSED:
            return said
        self._events.append({"event": "node_left_out", "node_id": node, "refused": MAX_REFUSED, "reason": reason})
        return f"{said}; after {MAX_REFUSED} such replies it gets no more work in this run"

    def take_events(self) -> list[dict[str, Any]]:
        """Return a ledger line for each node that was left out since the last call."""
        events, self._events = self._events, []
        return events

    def _nobody(self) -> str:
        num_left_out = sum(self.is_left_out(node) for node in self._refused)
        if not num_left_out:
            return f"no node joined within {self.timeout_s:.0f} s; start clients, then run again"
        return (
            f"no node is left: each of {num_left_out} sent {MAX_REFUSED} replies that cannot be used, last "
            f"{self._last}; install the server's version of fedlm on the nodes, or replace them, and resume"
        )
