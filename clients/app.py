"""The ClientApp: the same for simulated nodes, `flwr run` and real devices."""

from __future__ import annotations

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.host import DeviceHost
from clients.node_sum import NodeSum
from fedlm.config.load import config_from_toml
from fedlm.experiment import Weights
from fedlm.flower_records import from_records, to_records
from fedlm.messages import Broadcast, EvaluateRequest, FlushRequest, TrainRequest

app = ClientApp()

_hosts: dict[str, DeviceHost] = {}
_sums: dict[int, NodeSum] = {}  # by node: nodes in one process share the host, never the sum
_shared_weights: Weights | None = None


def share_weights(weights: Weights) -> None:
    """Give this process the base's weights in shared memory, before its first message."""
    global _shared_weights
    _shared_weights = weights or None


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the devices that the message names; their sum stays here unless the message asks for it."""
    request = from_records(TrainRequest, "request", message.content)
    kept = _sums.setdefault(context.node_id, NodeSum())
    reply = _host(context).train(from_records(Broadcast, "broadcast", message.content), request, kept)
    records = to_records("reply", reply)
    if request.flush:
        records |= to_records("sum", kept.flush(request.sum_name))
    return Message(RecordDict(records), reply_to=message)


@app.train("flush")
def flush(message: Message, context: Context) -> Message:
    """Send the sum that this node has kept."""
    request = from_records(FlushRequest, "request", message.content)
    partial = _sums.setdefault(context.node_id, NodeSum()).flush(request.sum_name)
    return Message(RecordDict(to_records("sum", partial)), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the held-out users that the message names."""
    request = from_records(EvaluateRequest, "request", message.content)
    reply = _host(context).evaluate(from_records(Broadcast, "broadcast", message.content), request)
    return Message(RecordDict(to_records("reply", reply)), reply_to=message)


def _host(context: Context) -> DeviceHost:
    """Return this process's host, kept between messages; nodes in one process share it."""
    text = str(context.run_config["config"])
    if text not in _hosts:
        _hosts.clear()
        _hosts[text] = DeviceHost(config_from_toml(text, imports_plugins=False), _shared_weights)
    return _hosts[text]
