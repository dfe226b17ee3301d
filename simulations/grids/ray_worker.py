"""The worker side of the Ray grid: one long-lived process for each node."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from fedlm.errors import ConfigError
from simulations.grids import wire
from simulations.grids.node import NodeAnswer, answer

CALL_S = 0.02
"""After this many seconds a call takes no further message."""

WORKING_FOLDER = "FEDLM_WORKING_FOLDER"
"""Environment variable with the driver's working folder, which Ray puts first on a worker's search path."""

SharedArrays = Mapping[str, np.ndarray]
Setup = Callable[[SharedArrays], None]


@dataclass(frozen=True)
class WorkerPlan:
    """What a fresh worker needs to take the place of a node.

    Arguments:
        app: Reference of the ClientApp, `package.module:name`.
        setup: Called once, before any message, with the shared arrays; None calls nothing.
        context: Of the node, with empty state.
    """

    app: str
    setup: Setup | None
    context: Context


class Worker:
    """The actor: it loads the ClientApp once and then answers one message after another."""

    def __init__(self) -> None:
        _working_folder_last()  # before any message or setup is read, which names modules of this project
        self._app: ClientApp
        self._context: Context
        self._ray = importlib.import_module("ray")
        self._records: dict[str, ArrayRecord] = {}  # large records of the last call, by their id in the object store
        self._backlog: deque[Message] = deque()

    def start(self, plan: WorkerPlan, shared: SharedArrays) -> int:
        """Load the app and hand it the shared arrays, which are read-only views of the object store.

        Returns:
            The process id.
        """
        self._app = load_client_app(plan.app)
        self._context = plan.context
        if plan.setup is not None:
            plan.setup(shared)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # one worker for each core: more threads only get in the way
        return os.getpid()

    def handle(self, packed: wire.Packed, references: Sequence[Any]) -> wire.Packed:
        """Take messages and answer the oldest that are left, at least one, until `CALL_S` have passed.

        Short calls keep replies flowing and show that the worker is alive; many messages in a call keep calls few.

        Arguments:
            packed: Parcels (`wire.detach`).
            references: Of the large records in the object store that the detached messages have lost.

        Returns:
            The packed outcomes, as many as there was time for.
        """
        deadline = time.monotonic() + CALL_S
        if references:
            self._records = {r.hex(): self._records.get(r.hex()) or self._ray.get(r) for r in references}
        records = [self._records[reference.hex()] for reference in references]
        self._backlog += [wire.attach(detached_message, records) for detached_message in wire.unpack(packed)]
        outcomes: list[NodeAnswer] = []
        while self._backlog and (not outcomes or time.monotonic() < deadline):
            outcomes.append(answer(self._app, self._backlog.popleft(), self._context))
        return wire.pack(outcomes)


def _working_folder_last() -> None:
    """Move the driver's working folder to the end of the search path: a user's `server.py` in it shadows nothing."""
    folder = os.environ.get(WORKING_FOLDER, "")
    if folder in sys.path and Path(folder) != Path(__file__).resolve().parents[2]:
        sys.path[:] = [*(path for path in sys.path if path != folder), folder]


def load_client_app(reference: str) -> ClientApp:
    """Return the ClientApp that `package.module:name` refers to.

    Raises:
        ConfigError: The reference has another form, or names something else.
    """
    module_name, colon, name = reference.partition(":")
    if not (module_name and colon and name):
        raise ConfigError(f"client app {reference!r}: expected 'package.module:name', such as 'clients.app:app'")
    try:
        app = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"client app {reference!r}: {error}; is its package installed?") from error
    if not isinstance(app, ClientApp):
        raise ConfigError(f"client app {reference!r} is {type(app).__name__}; it must be a ClientApp of flwr")
    return app
