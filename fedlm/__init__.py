"""fedlm: private federated learning of large-vocabulary language models.

The library: configuration, data, models, what trains, losses, local training, privacy, and the contract of aggregation
strategies. It knows nothing of the transport; `server`, `clients` and `simulations` build on it.

>>> import fedlm
>>> config = fedlm.load_config(None, ["rounds=3"])
>>> config.rounds
3

`fedlm.simulate(config)` then trains and returns the figures of the run. What this module offers is in `__all__`; a name
is imported when it is first used, so `import fedlm` costs neither torch nor numpy, flwr or ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlm.api import audit, finetune, plan, resume, simulate
    from fedlm.config.load import load_config
    from fedlm.config.schema import Config
    from fedlm.errors import FedlmError
    from fedlm.privacy.plan import PrivacyPlan
    from fedlm.privacy.release import Release
    from fedlm.strategies.contract import Strategy
    from fedlm.testkit.checks import check_strategy
    from fedlm.trainable.spec import UpdateSpec

__all__ = [
    "Config",
    "FedlmError",
    "PrivacyPlan",
    "Release",
    "Strategy",
    "UpdateSpec",
    "audit",
    "check_strategy",
    "finetune",
    "load_config",
    "plan",
    "resume",
    "simulate",
]

_HOMES = {
    "Config": "fedlm.config.schema",
    "FedlmError": "fedlm.errors",
    "PrivacyPlan": "fedlm.privacy.plan",
    "Release": "fedlm.privacy.release",
    "Strategy": "fedlm.strategies.contract",
    "UpdateSpec": "fedlm.trainable.spec",
    "audit": "fedlm.api",
    "check_strategy": "fedlm.testkit.checks",
    "finetune": "fedlm.api",
    "load_config": "fedlm.config.load",
    "plan": "fedlm.api",
    "resume": "fedlm.api",
    "simulate": "fedlm.api",
}
"""The module that defines each offered name."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedlm' has no attribute {name!r}; it offers {', '.join(__all__)}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found  # the next use finds it without this function
    return found


def __dir__() -> list[str]:
    return list(__all__)
