"""The workers of the Ray grid: one actor for each node, replaced when it is lost, within a limit."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedlm.errors import WorkerError
from simulations.grids.node import one_line
from simulations.grids.object_store import BroadcastStore
from simulations.grids.ray_session import Note, Wait
from simulations.grids.ray_worker import Worker, WorkerPlan

MAX_RESTARTS = 3
"""Workers lost in a row at one node, without a reply in between, after which the node is given up."""

_log = logging.getLogger(__name__)


@dataclass
class Node:
    """One node and the worker that currently is it.

    Arguments:
        plan: What a fresh worker gets.
        actor: The worker; None before the first and after the last.
        starting: Reference of the start in progress; None once it has ended.
        heard: When (monotonic seconds) the worker was started, last replied, or got work while it had none.
        losses: Workers lost in a row.
    """

    plan: WorkerPlan
    actor: Any = None
    starting: Any = None
    heard: float = 0.0
    losses: int = 0

    @property
    def given_up(self) -> bool:
        """Whether the node gets no further worker."""
        return self.losses > MAX_RESTARTS

    def hear(self) -> None:
        """Note a sign of life."""
        self.heard = time.monotonic()


class RayFleet:
    """Starts, replaces and ends workers, keeps a record of it, and holds what they all read.

    Arguments:
        ray: The ray module, connected.
        plans: Of each node, by its id.
        shared: Reference of the shared arrays in the object store.
        environment: Variables of the workers, set before their interpreters start.
        timeout_s: Longest silence of a worker that has work.
        start_timeout_s: Longest wait for a worker to start.
        note: Told, now and then, what is being waited for.
    """

    def __init__(
        self,
        ray: Any,
        plans: Mapping[int, WorkerPlan],
        shared: Any,
        *,
        environment: Mapping[str, str],
        timeout_s: float,
        start_timeout_s: float,
        note: Note,
    ) -> None:
        self._ray = ray
        self._shared = shared
        self._timeout_s, self._start_timeout_s, self._note = timeout_s, start_timeout_s, note
        self._actor_class = ray.remote(Worker).options(
            num_cpus=1, max_restarts=0, max_task_retries=0, runtime_env={"env_vars": dict(environment)}
        )
        self._events: list[dict[str, Any]] = []
        self.broadcasts = BroadcastStore(ray.put)
        self.nodes = {node_id: Node(plan) for node_id, plan in plans.items()}
        for node in self.nodes.values():
            self._start(node)

    def await_first_start(self) -> None:
        """Wait until every worker has started.

        Raises:
            WorkerError: One could not. That is for the user to mend, so nothing is tried again.
        """
        since = time.monotonic()
        for number, (node_id, node) in enumerate(self.nodes.items(), 1):
            what = f"worker {number} of {len(self.nodes)}"
            wait = Wait(what, since=since, limit_s=self._start_timeout_s, note=self._note)
            if not any(self._ray.wait([node.starting], timeout=seconds)[0] for seconds in wait.slices()):
                raise wait.failure()
            try:
                self._ray.get(node.starting, timeout=self._timeout_s)
            except self._ray.exceptions.RayError as error:
                raise WorkerError(f"the worker of node {node_id} could not start: {_cause(error)}") from error
            node.starting = None

    def starting(self) -> dict[Any, int]:
        """Return the node ids of replacements that are starting, by the reference of their start."""
        return {node.starting: node_id for node_id, node in self.nodes.items() if node.starting is not None}

    def failed_start(self, node_id: int) -> str:
        """Note the end of a replacement's start; return why it failed, or nothing when it did not."""
        node = self.nodes[node_id]
        reference, node.starting = node.starting, None
        try:
            self._ray.get(reference, timeout=self._timeout_s)
        except self._ray.exceptions.RayError as error:
            return f"could not start: {_cause(error)}"
        node.hear()
        self._events.append({"event": "worker_restarted", "node_id": node_id})
        return ""

    def silent(self, busy: Iterable[int]) -> dict[int, str]:
        """Return the nodes that have been silent for too long and why that is too long.

        Arguments:
            busy: Ids of the nodes whose workers have work.
        """
        now = time.monotonic()
        limits = dict.fromkeys(busy, self._timeout_s)
        limits.update(dict.fromkeys(self.starting().values(), self._start_timeout_s))
        return {
            node_id: f"silent for {limit_s:g} s"
            for node_id, limit_s in limits.items()
            if now - self.nodes[node_id].heard > limit_s
        }

    def replace(self, node_id: int, cause: str, num_messages: int) -> None:
        """Record that a worker was lost with the messages it held; start another unless the node is given up."""
        _log.debug("worker of node %d lost: %s", node_id, cause)
        node = self.nodes[node_id]
        self._events.append({"event": "worker_lost", "node_id": node_id, "cause": cause, "messages": num_messages})
        self._end(node)
        node.losses += 1
        if node.given_up:
            self._events.append({"event": "worker_given_up", "node_id": node_id})
        else:
            self._start(node)

    def take_events(self) -> list[dict[str, Any]]:
        """Return the events since the last call, oldest first."""
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """End every worker and drop what is in the object store."""
        for node in self.nodes.values():
            self._end(node)
        self.broadcasts.clear()
        self._shared = None

    def _start(self, node: Node) -> None:
        node.actor = self._actor_class.remote()
        node.starting = node.actor.start.remote(node.plan, self._shared)
        node.hear()

    def _end(self, node: Node) -> None:
        if node.actor is not None:
            self._ray.kill(node.actor, no_restart=True)
        node.actor = node.starting = None


def _cause(error: BaseException) -> str:
    return one_line(getattr(error, "cause", None) or error)
