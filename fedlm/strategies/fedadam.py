"""FedAdam: Reddi et al. 2021, "Adaptive Federated Optimization" (2003.00295), algorithm 2.

    m <- beta1 m + (1 - beta1) mean,   v <- beta2 v + (1 - beta2) mean^2,   w <- w + eta m^ / (sqrt(v^) + epsilon)

m^ and v^ have Adam's bias correction (the paper leaves it out). Moments of embedding rows outside the round's row set
are not touched, so a row's moments count only the rounds it took part in; the correction uses the number of rounds, as
is exact for everything but partial rows.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedlm.config.built_in_options import FedAdamOptions
from fedlm.strategies.contract import Release, ServerOptimizer, StrategyState
from fedlm.trainable.spec import Vector


class FedAdam(ServerOptimizer):
    """Server Adam on the noised mean update."""

    slot_names = ("m", "v")
    Options: ClassVar[type] = FedAdamOptions
    optimizer: ClassVar[str] = "adam"

    def update(self, state: StrategyState, release: Release) -> tuple[Vector, dict[str, float]]:
        """Update both moments in place and move along their ratio."""
        c, m, v, mean = self.options, state.slots["m"], state.slots["v"], release.mean
        m *= np.float32(c.beta1)
        m += np.float32(1 - c.beta1) * mean
        v *= np.float32(c.beta2)
        v += np.float32(1 - c.beta2) * mean * mean
        root = np.sqrt(v / np.float32(1 - c.beta2**state.num_steps))
        direction = m / np.float32(1 - c.beta1**state.num_steps) / (root + np.float32(c.epsilon))
        rate = np.float32(self.config.learning_rate)
        return state.values + rate * direction, {"step_norm": float(np.linalg.norm(direction))}
