"""FedAvg: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", 1602.05629.

    w <- w + eta * mean update

With user-level DP the mean is the clipped, noised mean over the expected cohort, every device weighted equally
(McMahan et al. 2018, 1710.06963).
"""

from __future__ import annotations

from fedlm.strategies.contract import Release, ServerOptimizer, StrategyState
from fedlm.trainable.spec import Vector


class FedAvg(ServerOptimizer):
    """Server SGD with learning rate `strategy.learning_rate`; 1.0 is plain averaging."""

    def update(self, state: StrategyState, release: Release) -> tuple[Vector, dict[str, float]]:
        """Move by the learning rate along the mean update."""
        return state.values + self.config.learning_rate * release.mean, {}
