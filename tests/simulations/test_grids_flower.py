"""What the grids take from flwr's private parts, and how its messages travel between server and node."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import simulations
from simulations.grids import flower_private, wire
from simulations.grids.inprocess import InProcessGrid


def _arrays() -> ArrayRecord:
    return ArrayRecord({"block.0": Array(np.arange(50_000.0)), "block.1": Array(np.full((), 3.5))})


def _named(values: list[object]) -> Iterator[tuple[str, object]]:
    """Name values by their position."""
    return ((f"k{i}", value) for i, value in enumerate(values))


_RECORDS = st.one_of(
    st.builds(
        lambda arrays: ArrayRecord({str(i): Array(a) for i, a in enumerate(arrays)}),
        st.lists(hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, min_side=0)), max_size=3),
    ),
    st.builds(
        lambda values: ConfigRecord(dict(_named(values))),
        st.lists(st.one_of(st.integers(0, 9), st.text(max_size=3), st.binary(max_size=3), st.lists(st.booleans()))),
    ),
    st.builds(lambda values: MetricRecord(dict(_named(values))), st.lists(st.integers(-9, 9))),
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(max_size=4), _RECORDS, max_size=4))
def test_messages_survive_the_wire(content: dict[str, wire.Record]) -> None:
    flower_private.adopt_server_identity(1)
    message = Message(RecordDict(content), 5, "train", group_id="7")
    for copy in (wire.clone(message), wire.attach(*wire.detach(message))):
        assert copy.content == message.content
        assert list(copy.content) == list(message.content)
        assert vars(copy.metadata) == vars(message.metadata)


def test_a_clone_shares_bytes_and_nothing_else() -> None:
    flower_private.adopt_server_identity(1)
    message = Message(RecordDict({"arrays": _arrays()}), 2, "train")
    message.content["arrays"]["block.0"].slice_array()  # as Flower's own transport leaves it: with cached views
    copy = wire.clone(message)
    assert copy.content["arrays"]["block.0"].data is message.content["arrays"]["block.0"].data
    copy.content["arrays"]["block.0"].data = b""
    del copy.content["arrays"]["block.1"]
    flower_private.set_message_id(copy, "other")
    assert message.content["arrays"] == _arrays()
    assert message.metadata.message_id == ""


def test_contract_task_identity_makes_this_process_the_server() -> None:
    flower_private.adopt_server_identity(17)
    metadata = Message(RecordDict(), 5, "train").metadata
    assert (metadata.run_id, metadata.src_node_id, metadata.src_task_id) == (
        17,
        flower_private.SERVER_NODE_ID,
        0,
    )
    assert flower_private.SERVER_NODE_ID == 1


def test_contract_run_carries_its_id() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"facts": ConfigRecord({"run": context.run_id})}), reply_to=message)

    with InProcessGrid(app, num_nodes=1, run_config={}) as grid:
        grid.set_run(flower_private.new_run(9))
        [reply] = grid.send_and_receive([grid.create_message(RecordDict(), "train", 2, "g")])
        assert grid.run.run_id == 9
    assert (reply.metadata.run_id, reply.content["facts"]["run"], reply.metadata.group_id) == (9, 9, "g")


def test_contract_message_ids_and_metadata_can_be_set() -> None:
    flower_private.adopt_server_identity(1)
    message = Message(RecordDict(), 5, "train")
    metadata = flower_private.copy_metadata(message.metadata)
    flower_private.set_message_id(message, "m-1")
    assert (message.metadata.message_id, metadata.message_id) == ("m-1", "")
    rebuilt = flower_private.rebuild_message(message.metadata, message.content)
    assert rebuilt.metadata is message.metadata
    assert Message(RecordDict(), reply_to=rebuilt).metadata.reply_to_message_id == "m-1"


def test_contract_error_replies_and_their_codes() -> None:
    assert (flower_private.APP_ERROR, flower_private.WORKER_LOST) == (2, 5)
    flower_private.adopt_server_identity(1)
    message = Message(RecordDict(), 5, "train")
    flower_private.set_message_id(message, "m-2")
    reply = flower_private.error_reply(message.metadata, flower_private.WORKER_LOST, "worker lost: x")
    assert reply.has_error()
    assert not reply.has_content()
    assert (reply.error.code, reply.error.reason) == (5, "worker lost: x")
    assert (reply.metadata.src_node_id, reply.metadata.reply_to_message_id) == (5, "m-2")


def test_private_parts_of_flwr_are_imported_in_one_module() -> None:
    public = {"app", "clientapp", "serverapp"}
    root = Path(simulations.__file__).parent
    private = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for parts in (name.split(".") for name in names if name.split(".")[0] == "flwr"):
                deep = len(parts) > 2 and parts[2] != "strategy"
                if len(parts) < 2 or parts[1] not in public or deep:
                    private.add(path.relative_to(root).as_posix())
    assert private == {"grids/flower_private.py"}
