"""Built-in strategies, one paper a file."""

from __future__ import annotations

from fedlm.strategy import Strategy
from server.strategies.fedadam import FedAdam
from server.strategies.fedavg import FedAvg

BUILT_IN: dict[str, type[Strategy]] = {"fedavg": FedAvg, "fedadam": FedAdam}
