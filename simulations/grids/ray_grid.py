"""A grid whose nodes are long-lived Ray actors, on this machine or on a cluster.

What a worker held when it died comes back as error replies with code `WORKER_LOST`, and a fresh worker takes
its node. Its Context starts empty, so a ClientApp keeps nothing there that it cannot do without.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Message, Metadata

from fedlm.errors import ConfigError, WorkerError
from simulations.grids import wire
from simulations.grids.base import LocalGrid
from simulations.grids.flower_private import (
    WORKER_LOST,
    error_reply,
    set_message_id,
)
from simulations.grids.node import NodeAnswer, Scalar, new_context, node_ids, one_line
from simulations.grids.ray_fleet import MAX_RESTARTS, RayFleet
from simulations.grids.ray_queue import NodeQueue, QueuedMessage
from simulations.grids.ray_session import (
    WORKER_ENVIRONMENT,
    Note,
    RaySession,
    available_cores,
    store_capacity,
    worker_niceness,
)
from simulations.grids.ray_worker import WORKING_FOLDER, Setup, WorkerPlan

PULL_WAIT_S = 0.05
"""Longest that `pull_messages` blocks when nothing is ready."""

_log = logging.getLogger(__name__)


class RayGrid(LocalGrid):
    """Runs a ClientApp on one actor for each node; the constructor returns at once, the first use waits.

    Arguments:
        app: Reference of the ClientApp; every worker imports it.
        setup: A module-level function that each worker calls once with the shared arrays, before any message.
        shared: Frozen arrays. They are stored once for each machine, and workers read them in place: `setup`
            gets read-only arrays without a copy.
        num_workers: Nodes, one CPU each; 0 means one for each CPU of the machine or cluster.
        run_config: Scalars of the run, in every context.
        node_config: Scalars of the nodes; `partition-id` and `num-partitions` are added.
        address: Of a running Ray cluster; empty starts Ray on this machine.
        timeout_s: A worker that holds messages and gives no reply for this long is given up for lost.
        start_timeout_s: Longest wait for Ray, and then for the workers, to start.
        note: Told, now and then, what is being waited for.

    Raises:
        ConfigError: A number is out of range, or more workers than CPUs (on a cluster: at first use).
    """

    def __init__(
        self,
        *,
        app: str = "clients.app:app",
        setup: Setup | None = None,
        shared: Mapping[str, np.ndarray] | None = None,
        num_workers: int = 0,
        run_config: Mapping[str, Scalar],
        node_config: Mapping[str, Scalar] | None = None,
        address: str = "",
        timeout_s: float = 600.0,
        start_timeout_s: float = 600.0,
        note: Note = lambda text: None,
    ) -> None:
        _check_numbers(num_workers, timeout_s)
        if not address:
            _check_cores(num_workers, available_cores())
        super().__init__()
        self._queues: dict[int, NodeQueue] = {}  # by node
        self._calls: dict[Any, int] = {}  # the node of each call in progress, by its reference, oldest first
        self._replies: dict[str, Message] = {}
        self._ready = False  # every worker has started once
        arrays = {name: np.ascontiguousarray(array) for name, array in (shared or {}).items()}
        self._shared_bytes = sum(array.nbytes for array in arrays.values())
        self.store_capacity_bytes = 0 if address else store_capacity(self._shared_bytes)

        def new_plan(index: int, num_nodes: int) -> WorkerPlan:
            return WorkerPlan(app, setup, new_context(index, num_nodes, run_config, node_config or {}))

        # workers here can import whatever this process can; on a cluster the packages are installed
        paths = {WORKING_FOLDER: os.getcwd(), **({} if address else _import_paths())}
        environment = {**WORKER_ENVIRONMENT, **worker_niceness(), **paths}

        def start_fleet(ray: Any) -> RayFleet:
            num_cpus = int(ray.cluster_resources().get("CPU", 0))
            _check_cores(num_workers, num_cpus)
            num_nodes = num_workers or num_cpus
            plans = {node_id: new_plan(index, num_nodes) for index, node_id in enumerate(node_ids(num_nodes))}
            stored = ray.put(arrays)
            arrays.clear()  # from here on the object store alone holds them for us
            limits = {"timeout_s": timeout_s, "start_timeout_s": start_timeout_s}
            return RayFleet(ray, plans, stored, environment=environment, **limits, note=note)

        self._timeout_s = timeout_s
        self._session = RaySession(
            address=address,
            store_bytes=self.store_capacity_bytes,
            start_timeout_s=start_timeout_s,
            note=note,
            on_connect=start_fleet,
        )

    def get_node_ids(self) -> list[int]:
        """Return the ids of the nodes that take messages; waits until their number is known.

        A node whose worker is being replaced is left out, unless there is no other: on a cluster that has lost a
        machine there may be no place for the replacement.
        """
        left = {node_id: node for node_id, node in self._fleet.nodes.items() if not node.given_up}
        ready = [node_id for node_id, node in left.items() if not self._ready or node.starting is None]
        return ready or list(left)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send each message to its node, which works on them in this order; the first call awaits the workers.

        Arguments:
            messages: Each is copied. Array records of at least `wire.DETACH_BYTES` go through the object store,
                once for all consecutive messages of one `group_id` that carry them.

        Returns:
            Their new ids.

        Raises:
            WorkerError: The workers cannot start, every node has been given up, or there is no such node.
        """
        if not self._ready:
            self._fleet.await_first_start()
            self._ready = True
        if not self.get_node_ids():
            raise WorkerError(
                f"no worker is left: at every node {MAX_RESTARTS + 1} were lost in a row; give them more memory, "
                "or fewer devices at a time (execution.workers, execution.group_size)"
            )
        message_ids = [self._post(message) for message in messages]
        self._send()
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have arrived, in the order of `message_ids`; blocks at most `PULL_WAIT_S`.

        Ids that are unknown or were answered before are passed over.
        """
        wanted = list(message_ids)
        self._collect(0.0 if any(message_id in self._replies for message_id in wanted) else PULL_WAIT_S)
        return [self._replies.pop(message_id) for message_id in wanted if message_id in self._replies]

    def take_events(self) -> list[dict[str, Any]]:
        """Return what happened to workers since the last call, oldest first.

        Each is `{"event": "worker_lost" | "worker_restarted" | "worker_given_up", "node_id": int}`; a loss also
        has its `cause` and the number of `messages` that the worker held.
        """
        return self._fleet.take_events()

    def figures(self) -> dict[str, float]:
        """Return this grid's figures for the ledger: what it keeps in the object store now, in MB."""
        return {"object_store_mb": round(self.object_store_bytes() / 1e6, 1)}

    def object_store_bytes(self) -> int:
        """Return the bytes that this grid keeps in the object store: shared arrays and current broadcasts."""
        return self._shared_bytes + self._fleet.broadcasts.num_bytes()

    def close(self) -> None:
        """End the workers, and Ray with all its processes if this grid has started it."""
        try:
            if fleet := self._session.settle():
                fleet.close()
        finally:
            self._session.close()
            self._calls.clear()
            self._queues.clear()

    @property
    def _fleet(self) -> RayFleet:
        """The workers; waits until they have been created."""
        return self._session.wait()

    def _post(self, message: Message) -> str:
        """Put a message into its node's queue."""
        node_id = message.metadata.dst_node_id
        node = self._fleet.nodes.get(node_id)
        if node is None:
            raise WorkerError(
                f"message for node {node_id}: this grid has nodes {self.get_node_ids()}; choose one of get_node_ids()"
            )
        message_id = self._stamp(message)
        detached_message, records = wire.detach(message)
        if node.given_up:
            self._deliver_error(detached_message.metadata, WORKER_LOST, "worker lost: its node was given up")
            return message_id
        queue = self._queues.setdefault(node_id, NodeQueue())
        if not queue.held:
            node.hear()
        self._fleet.broadcasts.enter(message.metadata.group_id)
        references = tuple(self._fleet.broadcasts.reference(record) for record in records)
        queue.waiting.append(QueuedMessage(message_id, detached_message, references))
        return message_id

    def _send(self) -> None:
        """Make the calls that are due."""
        for node_id, queue in self._queues.items():
            while call := queue.next_call():
                detached_messages, references = call
                reference = self._fleet.nodes[node_id].actor.handle.remote(wire.pack(detached_messages), references)
                self._calls[reference] = node_id

    def _collect(self, wait_s: float) -> None:
        """Settle every reference that is ready, then give up workers that have been silent for too long."""
        ray = self._session.ray
        starting = self._fleet.starting() if self._ready else {}
        references = [*starting, *self._calls]
        if not references:
            return
        ready, _ = ray.wait(references, num_returns=1, timeout=wait_s)
        if ready:  # `wait` returns no more than it was asked for
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in ready:
            if reference in self._calls:
                self._settle(reference)
            elif self._fleet.starting().get(reference) is not None:
                self._settle_start(starting[reference])
        busy = {node_id for node_id, queue in self._queues.items() if queue.held}
        for node_id, cause in self._fleet.silent(busy).items():
            self._lose(node_id, cause)
        self._send()

    def _settle(self, reference: Any) -> None:
        """Deliver the replies of a call that has ended."""
        node_id = self._calls.pop(reference)
        try:
            packed = self._session.ray.get(reference, timeout=self._timeout_s)
        except self._session.ray.exceptions.RayError as error:
            self._lose(node_id, one_line(error))
            return
        node, queue = self._fleet.nodes[node_id], self._queues[node_id]
        node.hear()
        node.losses = 0
        queue.calls -= 1
        outcomes: list[NodeAnswer] = wire.unpack(packed)
        for reply, traceback in outcomes:
            if traceback:
                _log.debug("node %d raised\n%s", node_id, traceback)
            del queue.held[reply.metadata.reply_to_message_id]
            self._deliver(reply)

    def _settle_start(self, node_id: int) -> None:
        if cause := self._fleet.failed_start(node_id):
            self._lose(node_id, cause)

    def _lose(self, node_id: int, cause: str) -> None:
        """Answer what a worker had with errors, and have it replaced."""
        queue, nodes = self._queues.setdefault(node_id, NodeQueue()), self._fleet.nodes
        self._calls = {reference: of for reference, of in self._calls.items() if of != node_id}
        lost = queue.take_held()
        self._fleet.replace(node_id, cause, len(lost))
        if nodes[node_id].given_up:
            lost.update(
                {
                    queued_message.message_id: queued_message.detached_message.metadata
                    for queued_message in queue.waiting
                }
            )
            queue.waiting.clear()
        for metadata in lost.values():
            self._deliver_error(metadata, WORKER_LOST, f"worker lost: {cause}")

    def _deliver_error(self, metadata: Metadata, code: int, reason: str) -> None:
        self._deliver(error_reply(metadata, code, reason))

    def _deliver(self, reply: Message) -> None:
        message_id = reply.metadata.reply_to_message_id
        set_message_id(reply, f"{message_id}-reply")
        self._replies[message_id] = reply


def _import_paths() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}


def _check_numbers(num_workers: int, timeout_s: float) -> None:
    if num_workers < 0 or not timeout_s > 0:
        raise ConfigError(
            f"num_workers = {num_workers}, timeout_s = {timeout_s:g}: expected num_workers >= 0 (0: one for "
            "each core) and timeout_s > 0"
        )


def _check_cores(num_workers: int, num_cpus: int) -> None:
    if num_workers > num_cpus:
        raise ConfigError(
            f"execution.workers = {num_workers}: there are {num_cpus} processor cores for them; set it to "
            f"{num_cpus} or fewer, or to 0 for one worker a core"
        )
