"""What a node does with one message: run the ClientApp, and turn an exception into an error reply."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import NamedTuple

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from simulations.grids.flower_private import APP_ERROR, SERVER_NODE_ID, error_reply

Scalar = bool | int | float | str

MAX_REASON = 300
"""Characters of an exception's message that an error reply carries."""


_EXPECTED_REPLY = "it must return Message(content, reply_to=message)"


class NodeAnswer(NamedTuple):
    """The reply of a node, and the traceback when it is an error reply of an app that raised."""

    reply: Message
    traceback: str


def node_ids(num_nodes: int) -> list[int]:
    """Return the ids of the nodes of a grid: they follow the server's."""
    return list(range(SERVER_NODE_ID + 1, SERVER_NODE_ID + 1 + num_nodes))


def new_context(
    index: int, num_nodes: int, run_config: Mapping[str, Scalar], node_config: Mapping[str, Scalar]
) -> Context:
    """Return the context of one node, with the `partition-id` and `num-partitions` of Flower's simulation.

    Arguments:
        index: Of the node, from 0.
        num_nodes: Of the grid.
        run_config: The run's scalars.
        node_config: Scalars that all nodes get besides the partition.

    Returns:
        A context with empty state; it lives as long as the node does.
    """
    partition: dict[str, Scalar] = {"partition-id": index, "num-partitions": num_nodes}
    return Context(
        run_id=0,  # set with each message: a grid may be given another run after its nodes have started
        node_id=node_ids(num_nodes)[index],
        node_config={**node_config, **partition},
        state=RecordDict(),
        run_config=dict(run_config),
    )


def one_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:MAX_REASON]}" if lines else type(error).__name__


def answer(app: ClientApp, message: Message, context: Context) -> NodeAnswer:
    """Run the app on one message.

    Arguments:
        app: The ClientApp, unchanged.
        message: From the server.
        context: Of the node; the app may change its state.

    Returns:
        The app's reply, or an error reply with code `APP_ERROR` when it raised or returned anything else.
        KeyboardInterrupt and SystemExit pass through.
    """
    metadata = message.metadata
    context.run_id = metadata.run_id
    try:
        reply = app(message, context)
        _check_reply(reply, metadata.message_id)
    except Exception as error:
        return NodeAnswer(error_reply(metadata, APP_ERROR, one_line(error)), traceback.format_exc())
    return NodeAnswer(reply, "")


def _check_reply(reply: object, message_id: str) -> None:
    if not isinstance(reply, Message):
        raise TypeError(f"the ClientApp returned {type(reply).__name__}; {_EXPECTED_REPLY}")
    if reply.metadata.reply_to_message_id != message_id:
        raise ValueError(f"the ClientApp answered another message; {_EXPECTED_REPLY}")
