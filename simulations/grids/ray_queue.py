"""The messages of one node of the Ray grid: a few calls at a time are with its worker, the others wait here.

Waiting here and not in Ray bounds what the object store and the worker hold, and messages that wait are not lost with
a worker.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flwr.app import Metadata

from simulations.grids.wire import DetachedMessage

CALLS_IN_FLIGHT = 2  # one is answered, one waits at the worker
MESSAGES_PER_CALL = 64


class QueuedMessage(NamedTuple):
    """A message that waits, in parts, and the references of its large records."""

    message_id: str
    detached_message: DetachedMessage
    references: tuple[Any, ...]


@dataclass
class NodeQueue:
    """The state of one node's messages.

    Arguments:
        waiting: Not sent yet, oldest first.
        held: Metadata of the messages that the worker has, by their id, oldest first.
        calls: Calls that the worker has not ended.
    """

    waiting: deque[QueuedMessage] = field(default_factory=deque)
    held: dict[str, Metadata] = field(default_factory=dict)
    calls: int = 0

    def next_call(self) -> tuple[list[DetachedMessage], list[Any]] | None:
        """Take what the next call carries: detached messages, and the references that these count from the first of.

        Returns:
            None when no call is due; an empty call lets the worker go on with messages that it has.
        """
        if self.calls >= CALLS_IN_FLIGHT or not (self.waiting or (self.held and not self.calls)):
            return None
        detached_messages: list[DetachedMessage] = []
        references: dict[Any, int] = {}
        while self.waiting and len(detached_messages) < MESSAGES_PER_CALL:
            queued_message = self.waiting.popleft()
            places = [references.setdefault(reference, len(references)) for reference in queued_message.references]
            detached_messages.append(queued_message.detached_message.renumbered(places))
            self.held[queued_message.message_id] = queued_message.detached_message.metadata
        self.calls += 1
        return detached_messages, list(references)

    def take_held(self) -> dict[str, Metadata]:
        """Return what the worker has, and forget it together with its calls."""
        held, self.held, self.calls = self.held, {}, 0
        return held
