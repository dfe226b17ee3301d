"""The options of the built-in classes that a config names, without the classes, so that a config loads at once.

Each is the `Options` of its class; `fedlm.registry` says which.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedlm.config.schema import option


@dataclass(frozen=True)
class FedAdamOptions:
    """Of `strategy.kind = "fedadam"`."""

    beta1: float = option(0.9, "first moment", low=0, high=0.9999)
    beta2: float = option(0.99, "second moment", low=0, high=0.99999)
    epsilon: float = option(1e-4, "added to the root of the second moment", above=0)
