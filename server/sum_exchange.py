"""Collects the cohort's sum: nodes keep theirs over many pieces and send it once, and every piece counts once.

A node answers a piece with small things and keeps the sum; when it has nothing left to do it is asked to *flush*, and
sends the sum with the numbers of the pieces in it. Sums are large and pieces many, so this is what makes pieces cheap.

Why every piece counts exactly once, whatever is lost, late, repeated or out of order:

* A node's sum has a name, made of this exchange, the node and a generation. The node drops a sum when it sees another
  name, so everything in a sum was asked for under one name.
* When anything goes wrong at a node (an error reply, silence, a sum that is not what was expected) its generation ends:
  whatever it may hold, or finish later, has a name that the server no longer accepts, and all its pieces that were not
  counted are done again.
* A sum is counted only under the current name, and only if its pieces are exactly those that the node has answered
  under that name and not flushed. A piece leaves that list by being counted or by being done again, never both.

Neither order nor repetition can change the result, because the sums are exact.
"""

from __future__ import annotations

import secrets
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedlm.flower_records import from_records
from fedlm.messages import FlushRequest, PartialSum, TrainRequest
from server.exchange import Exchange, Order, Outgoing, Piece, wait_for_nodes

FLUSH = "train.flush"


class SumExchange(Exchange):
    """Sends train requests and takes each node's sum.

    Arguments:
        grid, order, requests, timeout_s, on_lost: As for `Exchange`.
        take: Called with each partial sum that counts.
    """

    def __init__(
        self,
        grid: Grid,
        order: Order,
        requests: Sequence[TrainRequest],
        *,
        timeout_s: float,
        on_lost: Callable[[int, str], None],
        take: Callable[[PartialSum], None],
    ) -> None:
        super().__init__(grid, order, requests, timeout_s=timeout_s, on_lost=on_lost)
        self._take = take
        self._at_once = not nodes_remember(grid) or len(requests) <= len(wait_for_nodes(grid, timeout_s))
        self._name = secrets.token_hex(8)  # a server that was started again must not meet sums of its former life
        self._generation: Counter[int] = Counter()
        self._kept: dict[int, list[Piece]] = defaultdict(list)  # answered by a node, under its current name

    def _sum_name(self, node: int) -> str:
        return f"{self._name}/{node}/{self._generation[node]}"

    def _dress(self, node: int, piece: Piece) -> TrainRequest:
        request: TrainRequest = piece.request
        return replace(request, piece=piece.index, sum_name=self._sum_name(node), flush=self._at_once)

    def _other_messages(self) -> Iterator[Outgoing]:
        """Ask the nodes that have run out of work for what they keep."""
        for node, pieces in self._kept.items():
            if pieces and not self._waiting and not self._load[node]:
                yield Outgoing(node, FLUSH, FlushRequest(self._sum_name(node)), {}, tuple(pieces))
                self._kept[node] = []

    def _accept(self, sent: Outgoing, content: RecordDict) -> Iterator[tuple[int, RecordDict]]:
        if sent.request.sum_name != self._sum_name(sent.node):
            self._again(sent.pieces)
            return
        if sent.message_type != FLUSH:
            yield sent.pieces[0].index, content
            if not sent.request.flush:
                self._kept[sent.node].append(sent.pieces[0])
                return
        partial = from_records(PartialSum, "sum", content)
        if sorted(partial.pieces.tolist()) != sorted(piece.index for piece in sent.pieces):
            self._fail(sent, "the node no longer has what it had trained")
        elif partial.num_devices > sum(len(piece.request.devices) for piece in sent.pieces):
            # The bound on a sum's norm grows with its devices: their number is not the node's to say.
            self._fail(sent, f"the node's sum claims {partial.num_devices:,} devices, more than it was asked for")
        else:
            self._take(partial)

    def _fail(self, sent: Outgoing, reason: str) -> None:
        super()._fail(sent, reason)
        if sent.request.sum_name == self._sum_name(sent.node):
            self._generation[sent.node] += 1
            self._again(self._kept.pop(sent.node, []))


def nodes_remember(grid: Grid) -> bool:
    """Tell whether a node of this grid is one process from message to message; Flower's own may be a new one each time.

    A grid says so itself (`nodes_remember = True`); elsewhere each reply carries its sum.
    """
    return bool(getattr(grid, "nodes_remember", False))
