"""The worker side of the Ray grid: one long-lived process for each node."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.clientapp import ClientApp

from fedlm.errors import ConfigError
from simulations.grids import wire
from simulations.grids.node import Outcome, answer

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
        self._app: ClientApp
        self._context: Context

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

    def handle(self, parcel: wire.Parcel, *detached: ArrayRecord) -> Outcome:
        """Answer one message; its large array records come beside it, from the object store."""
        return answer(self._app, wire.attach(parcel, detached), self._context)


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
