"""Collects the cohort's sum: nodes keep theirs over many work items and send it once, and every work item counts once.

A node answers a work item with small things and keeps the sum; when it has nothing left to do it is asked to *flush*,
and sends the sum with the numbers of the work items in it. Sums are large and work items many, so this is what makes
work items cheap.

Why every work item counts exactly once, whatever is lost, late, repeated or out of order:

* A node's sum has a name, made of this exchange, the node and a generation. The node drops a sum when it sees another
  name, so everything in a sum was asked for under one name.
* When anything goes wrong at a node (an error reply, silence, a reply that cannot be used) its generation ends:
  whatever it may hold, or finish later, has a name that the server no longer accepts, and all its work items that were
  not counted are done again.
* A sum is counted only under the current name, and only if its work items are exactly those that the node has answered
  under that name and not flushed. A work item leaves that list by being counted or by being done again, never both.
* Whatever is wrong with a reply is found before any of it is used: a sum is added last, and whole or not at all
  (`ClippedSum.add_arrays`), and only then is the reply passed on. A flush is never stale: it asks for no model.
* A node that is left out after such replies loses its generation and its messages; their work items are in no other
  place.

Neither order nor repetition can change the result, because the sums are exact.
"""

from __future__ import annotations

import secrets
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from flwr.app import RecordDict

from fedlm.messages import FlushRequest, PartialSum, TrainReply, TrainRequest
from server.nodes import Nodes
from server.reply_checks import read_sum, read_train_reply
from server.transport.exchange import Exchange, ExchangeSpec, Outgoing, WorkItem

FLUSH = "train.flush"


class SumExchange(Exchange[TrainReply]):
    """Sends train requests and takes each node's sum.

    Arguments:
        nodes, exchange_spec, requests, on_lost: As for `Exchange`.
        take: Called with each partial sum that counts; raises `DataError`, and adds nothing, if it cannot be used.
    """

    def __init__(
        self,
        nodes: Nodes,
        exchange_spec: ExchangeSpec,
        requests: Sequence[TrainRequest],
        *,
        on_lost: Callable[[int, str], None],
        take: Callable[[PartialSum], None],
    ) -> None:
        super().__init__(nodes, exchange_spec, requests, read=read_train_reply, on_lost=on_lost)
        self._take = take
        self._at_once = not nodes.remember or len(requests) <= len(nodes.wait())
        self._name = secrets.token_hex(8)  # a server that was started again must not meet sums of its former life
        self._generation: Counter[int] = Counter()
        self._kept: dict[int, list[WorkItem]] = defaultdict(list)  # answered by a node, under its current name

    def _sum_name(self, node: int) -> str:
        return f"{self._name}/{node}/{self._generation[node]}"

    def _dress(self, node: int, work_item: WorkItem) -> TrainRequest:
        request: TrainRequest = work_item.request
        return replace(request, work_item=work_item.index, sum_name=self._sum_name(node), flush=self._at_once)

    def _other_messages(self) -> Iterator[Outgoing]:
        """Ask the nodes that have run out of work for what they keep."""
        for node, work_items in self._kept.items():
            if work_items and not self._waiting and not self._load[node]:
                yield Outgoing(node, FLUSH, FlushRequest(self._sum_name(node)), {}, tuple(work_items))
                self._kept[node] = []

    def _accept(self, sent: Outgoing, content: RecordDict) -> Iterator[tuple[int, TrainReply]]:
        if sent.request.sum_name != self._sum_name(sent.node):
            self._again(sent.work_items)
            return
        is_flush = sent.message_type == FLUSH
        reply = None if is_flush else self._fresh(sent, content)
        if reply is None and not is_flush:
            return
        if is_flush or sent.request.flush:
            partial = read_sum([(work_item.index, work_item.request) for work_item in sent.work_items], content)
            if len(partial.work_items) < len(sent.work_items):
                self._fail(sent, "the node no longer has what it had trained")
                return
            self._take(partial)
        else:
            self._kept[sent.node].append(sent.work_items[0])
        if reply is not None:
            yield sent.work_items[0].index, reply

    def _redo(self, sent: Outgoing, reason: str) -> None:
        super()._redo(sent, reason)
        if sent.request.sum_name == self._sum_name(sent.node):
            self._generation[sent.node] += 1
            self._again(self._kept.pop(sent.node, []))
