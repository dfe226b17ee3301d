"""A grid whose nodes are long-lived Ray actors, on this machine or on a cluster.

What a worker held when it died comes back as error replies with code `WORKER_LOST`, and a fresh worker takes its
node; its Context starts empty, so a ClientApp keeps nothing there that it cannot do without.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Message, Metadata

from fedlm.errors import ConfigError, WorkerError
from simulations.grids import wire
from simulations.grids.base import LocalGrid
from simulations.grids.broadcast import BroadcastStore
from simulations.grids.flower_private import APP_ERROR, WORKER_LOST, copy_metadata, error_reply, set_message_id
from simulations.grids.node import Outcome, Scalar, new_context, node_ids, one_line
from simulations.grids.ray_session import START_TIMEOUT_S, RaySession, available_cores, store_capacity
from simulations.grids.ray_worker import Setup, SharedArrays, Worker, WorkerPlan

MAX_RESTARTS = 3
"""Workers lost in a row at one node, without a reply in between, after which the node is given up."""

PULL_WAIT_S = 0.05
"""Longest that `pull_messages` blocks when nothing is ready."""

_log = logging.getLogger(__name__)


@dataclass
class _Node:
    plan: WorkerPlan
    actor: Any = None
    starting: Any = None  # reference of the pending start, None once it has ended
    heard: float = 0.0  # when this worker was started, gave its last reply, or got work while it had none
    losses: int = 0  # in a row
    given_up: bool = False


@dataclass(frozen=True)
class _Sent:
    message_id: str
    metadata: Metadata
    node_id: int


class RayGrid(LocalGrid):
    """Runs a ClientApp on one actor for each node; the constructor returns at once, the first use waits.

    Arguments:
        app: Reference of the ClientApp; every worker imports it.
        setup: A module-level function that each worker calls once with the shared arrays, before any message.
        shared: Frozen arrays. They are stored once for each machine, and workers read them in place: `setup` gets
            read-only arrays without a copy.
        num_workers: Nodes, one CPU each; 0 means one for each CPU of the machine or cluster.
        run_config: Scalars of the run, in every context.
        node_config: Scalars of the nodes; `partition-id` and `num-partitions` are added.
        address: Of a running Ray cluster; empty starts Ray on this machine.
        timeout_s: A worker that holds messages and gives no reply for this long is given up for lost.

    Raises:
        ConfigError: A number is out of range, or there are more workers than CPUs (on a cluster: at first use).
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
    ) -> None:
        if num_workers < 0 or not timeout_s > 0:
            raise ConfigError(
                f"num_workers = {num_workers}, timeout_s = {timeout_s:g}: expected num_workers >= 0 (0: one for each "
                "core) and timeout_s > 0"
            )
        if not address:
            _check_cores(num_workers, available_cores())
        super().__init__()
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._new_plan: Callable[[int, int], WorkerPlan] = lambda index, num_nodes: WorkerPlan(
            app, setup, new_context(index, num_nodes, run_config, node_config or {})
        )
        self._nodes: dict[int, _Node] = {}
        self._sent: dict[Any, _Sent] = {}  # by the reference of the outcome, oldest first
        self._replies: dict[str, Message] = {}
        self._events: list[dict[str, Any]] = []
        self._ready = False
        self._shared: dict[str, np.ndarray] | Any = {k: np.ascontiguousarray(v) for k, v in (shared or {}).items()}
        self._shared_bytes = sum(array.nbytes for array in self._shared.values())
        self.store_capacity_bytes = 0 if address else store_capacity(self._shared_bytes)
        self._session = RaySession(
            address=address, store_bytes=self.store_capacity_bytes, on_connect=self._start_nodes
        )

    def get_node_ids(self) -> list[int]:
        """Return the ids of the nodes that have not been given up; waits until their number is known."""
        self._session.wait()
        return [node_id for node_id, node in self._nodes.items() if not node.given_up]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send each message to its node, which works on them in this order; the first call waits for the workers.

        Arguments:
            messages: Each is copied. Array records of at least `wire.DETACH_BYTES` go through the object store, once
                for all messages of the same `group_id` that carry them.

        Returns:
            Their new ids.

        Raises:
            WorkerError: The workers cannot start, every node has been given up, or there is no such node.
        """
        self._await_workers()
        if not self.get_node_ids():
            raise WorkerError(
                f"no worker is left: each of {len(self._nodes)} was lost {MAX_RESTARTS + 1} times in a row; "
                "give them more memory or fewer devices at a time (execution.workers, execution.group_size)"
            )
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have arrived, in the order of `message_ids`; blocks at most `PULL_WAIT_S`.

        Ids that are unknown or were answered before are passed over.
        """
        wanted = list(message_ids)
        self._collect(0.0 if any(i in self._replies for i in wanted) else PULL_WAIT_S)
        return [self._replies.pop(message_id) for message_id in wanted if message_id in self._replies]

    def take_events(self) -> list[dict[str, Any]]:
        """Return what happened to workers since the last call, oldest first.

        Each is `{"event": "worker_lost" | "worker_restarted" | "worker_given_up", "node_id": int}`; a loss also has
        its `cause` and the number of `messages` that the worker held.
        """
        events, self._events = self._events, []
        return events

    def object_store_bytes(self) -> int:
        """Return the bytes that this grid keeps in the object store: shared arrays and the current broadcasts."""
        self._session.wait()
        return self._shared_bytes + self._broadcasts.num_bytes()

    def close(self) -> None:
        """End the workers, and Ray with all its processes if this grid has started it."""
        try:
            if self._session.ray is not None and self._session.ray.is_initialized():
                for node in self._nodes.values():
                    self._end(node)
        finally:
            self._session.close()
            self._sent.clear()
            self._nodes.clear()

    def _start_nodes(self, ray: Any) -> None:
        """Run in the session's thread: store the shared arrays and start every worker."""
        num_cpus = int(ray.cluster_resources().get("CPU", 0))
        _check_cores(self._num_workers, num_cpus)
        self._ray = ray
        self._actor_class = ray.remote(Worker).options(num_cpus=1, max_restarts=0, max_task_retries=0)
        self._broadcasts = BroadcastStore(ray.put)
        self._shared = ray.put(self._shared)  # from here on only the object store holds them for us
        num_nodes = self._num_workers or num_cpus
        for index, node_id in enumerate(node_ids(num_nodes)):
            self._nodes[node_id] = _Node(self._new_plan(index, num_nodes))
            self._start(self._nodes[node_id])

    def _start(self, node: _Node) -> None:
        node.actor = self._actor_class.remote()
        node.starting = node.actor.start.remote(node.plan, self._shared)
        node.heard = time.monotonic()

    def _end(self, node: _Node) -> None:
        if node.actor is not None:
            self._ray.kill(node.actor, no_restart=True)
        node.actor = node.starting = None

    def _await_workers(self) -> None:
        """Wait until every worker has started once; a failure here is the user's to mend, so nothing is retried."""
        self._session.wait()
        if self._ready:
            return
        deadline = time.monotonic() + START_TIMEOUT_S
        for node_id, node in self._nodes.items():
            try:
                self._ray.get(node.starting, timeout=max(0.0, deadline - time.monotonic()))
            except self._ray.exceptions.RayError as error:
                reason = one_line(getattr(error, "cause", None) or error)
                raise WorkerError(f"the worker of node {node_id} could not start: {reason}") from error
            node.starting = None
        self._ready = True

    def _push(self, message: Message) -> str:
        metadata = message.metadata
        node = self._nodes.get(metadata.dst_node_id)
        if node is None:
            raise WorkerError(
                f"message for node {metadata.dst_node_id}: this grid has nodes {self.get_node_ids()}; "
                "choose one of get_node_ids()"
            )
        message_id = self._stamp(message)
        sent = _Sent(message_id, copy_metadata(metadata), metadata.dst_node_id)
        if node.given_up:
            self._fail(sent, WORKER_LOST, "worker lost: its node has been given up")
            return message_id
        if not self._held_by(sent.node_id):
            node.heard = time.monotonic()
        parcel, records = wire.detach(message)
        references = [self._broadcasts.reference(record, metadata.group_id) for record in records]
        self._sent[node.actor.handle.remote(parcel, *references)] = sent
        return message_id

    def _collect(self, wait_s: float) -> None:
        """Settle every reference that is ready, then give up workers that have been silent too long."""
        starting = {node.starting: node_id for node_id, node in self._nodes.items() if node.starting is not None}
        references = [*starting, *self._sent]
        if not references:
            return
        ready, _ = self._ray.wait(references, num_returns=1, timeout=wait_s)
        if ready:  # `wait` returns no more than it was asked for
            ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        for reference in ready:
            if reference in starting:
                self._settle_start(reference, starting[reference])
            elif reference in self._sent:  # not lost with its worker a moment ago
                self._settle(reference)
        self._lose_silent_workers()

    def _settle_start(self, reference: Any, node_id: int) -> None:
        node = self._nodes[node_id]
        if node.starting is not reference:
            return
        try:
            self._ray.get(reference, timeout=self._timeout_s)
        except self._ray.exceptions.RayError as error:
            self._lose(node_id, f"could not start: {one_line(getattr(error, 'cause', None) or error)}")
            return
        node.starting = None
        node.heard = time.monotonic()
        self._events.append({"event": "worker_restarted", "node_id": node_id})

    def _settle(self, reference: Any) -> None:
        sent = self._sent[reference]
        try:
            outcome: Outcome = self._ray.get(reference, timeout=self._timeout_s)
        except self._ray.exceptions.RayTaskError as error:  # outside the app: its reply cannot be sent, for one
            outcome = Outcome(error_reply(sent.metadata, APP_ERROR, one_line(error.cause)), str(error))
        except self._ray.exceptions.RayError as error:
            self._lose(sent.node_id, one_line(error))
            return
        del self._sent[reference]
        node = self._nodes[sent.node_id]
        node.heard, node.losses = time.monotonic(), 0
        if outcome.traceback:
            _log.debug("node %d raised\n%s", sent.node_id, outcome.traceback)
        self._deliver(sent, outcome.reply)

    def _lose_silent_workers(self) -> None:
        now = time.monotonic()
        busy = {sent.node_id for sent in self._sent.values()}
        for node_id, node in list(self._nodes.items()):
            limit_s = START_TIMEOUT_S if node.starting is not None else self._timeout_s
            waits = node.starting is not None or node_id in busy
            if waits and now - node.heard > limit_s:
                self._lose(node_id, f"silent for {limit_s:g} s")

    def _lose(self, node_id: int, cause: str) -> None:
        """Answer what a worker held with errors and start another one, unless too many were lost in a row."""
        node = self._nodes[node_id]
        held = self._held_by(node_id)
        for reference in held:
            self._fail(self._sent.pop(reference), WORKER_LOST, f"worker lost: {cause}")
        self._events.append(
            {"event": "worker_lost", "node_id": node_id, "cause": cause, "messages": len(held)}
        )
        _log.debug("worker of node %d lost: %s", node_id, cause)
        self._end(node)
        node.losses += 1
        node.given_up = node.losses > MAX_RESTARTS
        if node.given_up:
            self._events.append({"event": "worker_given_up", "node_id": node_id})
        else:
            self._start(node)

    def _held_by(self, node_id: int) -> list[Any]:
        return [reference for reference, sent in self._sent.items() if sent.node_id == node_id]

    def _fail(self, sent: _Sent, code: int, reason: str) -> None:
        self._deliver(sent, error_reply(sent.metadata, code, reason))

    def _deliver(self, sent: _Sent, reply: Message) -> None:
        set_message_id(reply, f"{sent.message_id}-reply")
        self._replies[sent.message_id] = reply


def _check_cores(num_workers: int, num_cpus: int) -> None:
    if num_workers > num_cpus:
        raise ConfigError(
            f"execution.workers = {num_workers}: there are {num_cpus} processor cores for them; set it to "
            f"{num_cpus} or fewer, or to 0 for one worker a core"
        )


__all__ = ["MAX_RESTARTS", "RayGrid", "SharedArrays"]
