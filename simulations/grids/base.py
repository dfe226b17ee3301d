"""The part of `flwr.serverapp.Grid` that all grids of the virtual fleet share."""

from __future__ import annotations

import itertools
import time
from abc import abstractmethod
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from simulations.grids.flower_private import Run, adopt_server_identity, new_run, set_message_id

RUN_ID = 1


class LocalGrid(Grid):
    """A grid whose nodes live as long as it does; use it as a context manager.

    Its nodes remember: each is one process (or part of this one) from message to message, until it is lost.
    A message's time to live is not enforced. Replies that nobody pulls stay until the grid is closed.
    """

    nodes_remember = True

    def __init__(self) -> None:
        self._message_numbers = itertools.count(1)
        self.set_run(new_run(RUN_ID))

    def set_run(self, run: Run) -> None:
        """Make this process the server of `run`."""
        self._run = run
        adopt_server_identity(run.run_id)

    @property
    def run(self) -> Run:
        """The run that this grid operates in."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return `Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    @abstractmethod
    def get_node_ids(self) -> list[int]:
        """Return the ids of the nodes that take messages."""

    @abstractmethod
    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send each message to its node and return their new ids in the same order."""

    @abstractmethod
    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to these messages that have arrived; each is returned once."""

    @abstractmethod
    def close(self) -> None:
        """End the nodes; closing twice does nothing."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push messages and pull their replies.

        Arguments:
            messages: To be sent.
            timeout: Seconds after which the replies that have arrived are returned; None waits for all.

        Returns:
            The replies in the order of their arrival.
        """
        outstanding = set(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while outstanding and (deadline is None or time.monotonic() < deadline):
            arrived = self.pull_messages(outstanding)
            outstanding -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
        return replies

    def _stamp(self, message: Message) -> str:
        message_id = f"{self._run.run_id}-{next(self._message_numbers)}"
        set_message_id(message, message_id)
        return message_id

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
