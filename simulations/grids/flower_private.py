"""The only module that imports private parts of flwr.

flwr moves its modules with every release; tests/simulations/test_grids_flower.py has a contract test for each part.
When one fails after an upgrade, this is the file to mend.

    TaskIdentity       process-global; `flwr.app.Message(...)` raises without it
    Run                what `Grid.run` returns
    make_message       a message with given metadata, as the SuperLink rebuilds it
    message id         assigned by the SuperLink; `Metadata` has no setter
    error codes        what error replies carry on Flower's own grid
"""

from __future__ import annotations

import copy

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID: int = SUPERLINK_NODE_ID
"""The node id of the server; nodes of our grids are numbered from the next one."""

APP_ERROR: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
"""Code of the error reply when the ClientApp raised an exception."""

WORKER_LOST: int = ErrorCode.NODE_UNAVAILABLE
"""Code of the error reply when the node died or fell silent; its message can be sent to another node."""


def adopt_server_identity(run_id: int) -> None:
    """Make this process the server of run `run_id`, without which it cannot create messages."""
    TaskIdentity.run_id = run_id
    TaskIdentity.task_id = 0
    TaskIdentity.node_id = SERVER_NODE_ID


def new_run(run_id: int) -> Run:
    """Return a run that carries nothing but its id."""
    return Run.create_empty(run_id)


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, which on Flower's own grid the SuperLink does."""
    message.metadata.__dict__["_message_id"] = message_id


def rebuild_message(metadata: Metadata, content: RecordDict) -> Message:
    """Return the message that has this metadata and content."""
    return make_message(metadata, content=content)


def copy_metadata(metadata: Metadata) -> Metadata:
    """Return a copy that later changes of the original's ids do not reach."""
    return copy.copy(metadata)


def error_reply(metadata: Metadata, code: int, reason: str) -> Message:
    """Return the error reply to the message with this metadata.

    Arguments:
        metadata: Of the message that gets no other reply.
        code: `APP_ERROR` or `WORKER_LOST`.
        reason: One line.

    Returns:
        A message for which `has_error()` is true.
    """
    return Message(Error(code, reason), reply_to=rebuild_message(metadata, RecordDict()))


__all__ = [
    "APP_ERROR",
    "SERVER_NODE_ID",
    "WORKER_LOST",
    "Run",
    "adopt_server_identity",
    "copy_metadata",
    "error_reply",
    "new_run",
    "rebuild_message",
    "set_message_id",
]
