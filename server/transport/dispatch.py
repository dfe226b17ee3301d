"""Hands a round's work to the nodes of any Flower `Grid`: who gets how much, and in which kind of exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.serverapp import Grid

from fedlm.data.store import TokenStore
from fedlm.messages import EvaluateReply, EvaluateRequest, PartialSum, TrainReply, TrainRequest
from fedlm.trainable.spec import RowIds
from server.nodes import Nodes
from server.reply_checks import evaluation_reader
from server.scheduling import cut_work_items
from server.transport.exchange import Exchange, ExchangeSpec
from server.transport.sum_exchange import SumExchange


class Dispatcher:
    """Sends requests to nodes.

    Arguments:
        grid: Any Flower grid.
        timeout_s: A node that has work and is silent for longer is given up for that work.
        on_lost: Called with `(node, reason)` when work has to be done again.
    """

    def __init__(self, grid: Grid, timeout_s: float, on_lost: Callable[[int, str], None]) -> None:
        self._grid, self._nodes = grid, Nodes(grid, timeout_s)
        self._on_lost = on_lost

    def evaluate(
        self, exchange_spec: ExchangeSpec, requests: Sequence[EvaluateRequest], store: TokenStore, num_sums: int
    ) -> Iterator[tuple[int, EvaluateReply]]:
        """Yield `(index of the request, reply)` in the order of arrival.

        Arguments:
            exchange_spec: What all messages share.
            requests: Which users to score.
            store: The corpus that they are in.
            num_sums: Numbers that the further metrics of the evaluation add up.

        Raises:
            WorkerError: A request failed too often, or no node is left.
        """
        read = evaluation_reader(store, num_sums)
        return Exchange(self._nodes, exchange_spec, requests, read=read, on_lost=self._on_lost).replies()

    def train(
        self, exchange_spec: ExchangeSpec, requests: Sequence[TrainRequest], take: Callable[[PartialSum], None]
    ) -> Iterator[tuple[int, TrainReply]]:
        """Yield `(index of the request, reply)`; an index may come again, and then the later reply counts.

        Arguments:
            exchange_spec: What all messages share.
            requests: The work items.
            take: Called with partial sums that together hold every work item exactly once. It raises `DataError`, and
                adds nothing, for a sum that cannot be used.

        Raises:
            WorkerError: A request failed too often, or no node is left.
        """
        if not requests:
            return iter(())
        return SumExchange(self._nodes, exchange_spec, requests, on_lost=self._on_lost, take=take).replies()

    def take_events(self) -> list[dict[str, Any]]:
        """Return what has happened to workers and nodes since the last call, as far as the grid keeps a record."""
        events: list[dict[str, Any]] = getattr(self._grid, "take_events", list)()
        return [*events, *self._nodes.take_events()]

    def figures(self) -> dict[str, float]:
        """Return the grid's own figures for the ledger; none from a grid that has none."""
        figures: dict[str, float] = getattr(self._grid, "figures", dict)()
        return figures

    def work_items(
        self,
        cohort: RowIds,
        num_tokens: npt.NDArray[np.int64],
        groups: Sequence[npt.NDArray[np.int64]],
        clip_spec: str,
    ) -> list[TrainRequest]:
        """Cut a cohort's groups into requests.

        Arguments:
            cohort: Device ids (U,).
            num_tokens: (U,) tokens of each.
            groups: Positions in the cohort, largest devices first.
            clip_spec: As text.
        """
        if not groups:
            return []
        num_nodes = len(self._nodes.wait())
        work_items = cut_work_items(num_tokens, groups, num_nodes=num_nodes, one_each=not self._nodes.remember)
        return [
            TrainRequest(cohort[np.concatenate(work_item)], np.array([len(group) for group in work_item]), clip_spec)
            for work_item in work_items
        ]
