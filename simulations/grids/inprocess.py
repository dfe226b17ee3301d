"""A grid whose nodes live in this process and take turns: no start-up, no second copy of the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from flwr.app import Message
from flwr.clientapp import ClientApp

from fedlm.errors import ConfigError, WorkerError
from simulations.grids.base import LocalGrid
from simulations.grids.flower_private import set_message_id
from simulations.grids.node import Scalar, answer, new_context, node_ids
from simulations.grids.wire import clone

_log = logging.getLogger(__name__)


class InProcessGrid(LocalGrid):
    """Runs each message in this process when its reply is asked for.

    Arguments:
        client_app: The ClientApp that every node runs.
        num_nodes: Nodes, each with a context of its own that lives as long as the grid.
        run_config: Scalars of the run, in every context.
        node_config: Scalars of the nodes; `partition-id` and `num-partitions` are added.

    Raises:
        ConfigError: `num_nodes` is less than 1.
    """

    def __init__(
        self,
        client_app: ClientApp,
        *,
        num_nodes: int,
        run_config: Mapping[str, Scalar],
        node_config: Mapping[str, Scalar] | None = None,
    ) -> None:
        if num_nodes < 1:
            raise ConfigError(f"num_nodes = {num_nodes}: at least 1 node is needed; set it to 1 or more")
        super().__init__()
        self._app = client_app
        self._contexts = {
            node_id: new_context(index, num_nodes, run_config, node_config or {})
            for index, node_id in enumerate(node_ids(num_nodes))
        }
        self._queue: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages; nothing runs until `pull_messages`.

        Arguments:
            messages: Each is copied, so the caller may change and send it again.

        Returns:
            Their new ids.

        Raises:
            WorkerError: A message is for a node that this grid does not have.
        """
        message_ids = []
        for message in messages:
            if message.metadata.dst_node_id not in self._contexts:
                raise WorkerError(
                    f"message for node {message.metadata.dst_node_id}: this grid has nodes "
                    f"{self.get_node_ids()}; choose one of get_node_ids()"
                )
            message_ids.append(self._stamp(message))
            self._queue[message_ids[-1]] = clone(message)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run one of these messages, the one that was pushed first, and return its reply.

        One message a call, so that the caller can show progress. Ids that are unknown or were answered before
        are passed over.
        """
        wanted = set(message_ids)
        message_id = next((queued for queued in self._queue if queued in wanted), None)
        if message_id is None:
            return []
        message = self._queue.pop(message_id)
        reply, traceback = answer(self._app, message, self._contexts[message.metadata.dst_node_id])
        if traceback:
            _log.debug("node %d raised\n%s", message.metadata.dst_node_id, traceback)
        reply = clone(reply)
        set_message_id(reply, f"{message_id}-reply")
        return [reply]

    def close(self) -> None:
        """Drop queued messages; the nodes' contexts stay with the grid."""
        self._queue.clear()
