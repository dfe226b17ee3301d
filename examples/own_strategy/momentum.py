"""A strategy of one's own: server momentum (FedAvgM, Hsu et al. 2019, arXiv 1909.06335), with fedlm as the only import.

    m <- beta m + mean,   w <- w + eta m

`release.mean` is the clipped, noised mean over the expected cohort: whatever is done with it costs no privacy.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedlm.config.schema import option
from fedlm.strategies import Release, ServerOptimizer, StrategyState
from fedlm.trainable.spec import Vector


@dataclass(frozen=True)
class MomentumOptions:
    """What [strategy.options] may hold; checked and shown like every other key."""

    beta: float = option(0.9, "momentum", low=0, high=0.9999)


class Momentum(ServerOptimizer):
    """Heavy-ball momentum on the noised mean update."""

    Options = MomentumOptions
    slot_names = ("momentum",)  # kept with the model, checkpointed, and gathered for each round's rows

    def update(self, state: StrategyState, release: Release) -> tuple[Vector, dict[str, float]]:
        """Update the momentum in place and move along it."""
        momentum = state.slots["momentum"]
        momentum *= self.options.beta
        momentum += release.mean
        return state.values + self.config.learning_rate * momentum, {}
