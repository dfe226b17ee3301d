"""The contract that aggregation strategies fulfil: from the server's state and a round's release to the next state.

A strategy never sees a device's update, nor the cohort's sum: it gets a `Release`, which is clipped, noised and divided
by the expected cohort. Everything that it computes is post-processing and costs no privacy.

Most strategies treat the noised mean as a gradient (Reddi et al. 2021, "Adaptive Federated Optimization", 2003.00295).
A plug-in needs `fedlm.strategies` alone:

    class Averaging(ServerOptimizer):
        def update(self, state, release):
            return state.values + 0.5 * release.mean, {}

and `strategy.kind = "mypkg.strategies:Averaging"` in the TOML file. A method that trains other blocks in other rounds,
or changes blocks that no device sends, derives from `Strategy` and says so in `moves`, `sends` and `changes`. A
class attribute `Options`, a frozen dataclass, gives it options of its own: [strategy.options] in the file,
`self.options` here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from fedlm.config.keys import typed_options
from fedlm.config.schema import StrategyConfig
from fedlm.errors import ConfigError
from fedlm.privacy.release import Release
from fedlm.registry import STRATEGIES, NoOptions
from fedlm.trainable.spec import UpdateSpec, Vector

__all__ = ["Release", "ServerOptimizer", "Strategy", "StrategyState", "UpdateSpec", "Vector"]


def strategy_of(config: StrategyConfig) -> Strategy:
    """Return the strategy that a config names.

    Raises:
        ConfigError: Nothing of that name, or it does not fulfil the contract.
    """
    kind = STRATEGIES.resolve(config.kind)
    try:
        strategy = kind(config)
    except TypeError as error:  # another signature, or no `step`
        raise ConfigError(
            f"strategy.kind = {config.kind!r} cannot be made from a StrategyConfig ({error}); see fedlm.strategies"
        ) from error
    if not isinstance(strategy, Strategy):
        raise ConfigError(f"strategy.kind = {config.kind!r} is no fedlm.strategies.Strategy; derive it from that class")
    return strategy


@dataclass(frozen=True)
class StrategyState:
    """Everything that a strategy carries from round to round; checkpoints store it.

    Arguments:
        values: (P_full,) every block that the server may change.
        slots: Optimiser arrays of the same size (P_full,), by name.
        num_steps: Rounds finished; the engine counts them.
    """

    values: Vector
    slots: Mapping[str, Vector] = field(default_factory=dict)
    num_steps: int = 0


class Strategy(ABC):
    """An aggregation strategy. What it remembers is in its `StrategyState`, never on the object: a run may resume.

    Arguments:
        config: The section [strategy].
    """

    slot_names: tuple[str, ...] = ()
    Options: ClassVar[type] = NoOptions
    """What [strategy.options] may hold: a frozen dataclass whose fields are made with `fedlm.config.schema.option`."""
    optimizer: ClassVar[str] = "sgd"
    """How a step scales the noise of a release (`fedlm.models.re_attention.noise_levels.step_variance`)."""

    def __init__(self, config: StrategyConfig) -> None:
        self.config = config
        self.options: Any = typed_options(type(self), config.options, "strategy.options")

    def init(self, spec: UpdateSpec, values: Vector) -> StrategyState:
        """Return the first state, whose optimiser arrays are zero.

        Arguments:
            spec: Every block that the server may change, with all rows.
            values: (P_full,) of the base.
        """
        return StrategyState(values, {name: np.zeros(spec.size, np.float32) for name in self.slot_names})

    def moves(self, round_number: int, spec: UpdateSpec) -> tuple[str, ...]:
        """Return the names of the blocks that devices train in a round: a function of its number alone; all of them.

        Arguments:
            round_number: Counts from 1.
            spec: Every block that the server may change.
        """
        return tuple(block.name for block in spec.blocks)

    def sends(self, round_number: int, spec: UpdateSpec) -> tuple[str, ...]:
        """Return the blocks that devices send: of those that they train; what is clipped, noised and counted."""
        return self.moves(round_number, spec)

    def changes(self, round_number: int, spec: UpdateSpec) -> tuple[str, ...]:
        """Return the blocks that `step` may change in a round: they travel to the devices before the next one."""
        return self.sends(round_number, spec)

    @abstractmethod
    def step(self, state: StrategyState, release: Release) -> tuple[StrategyState, dict[str, float]]:
        """Return the next state and public diagnostics.

        Arguments:
            state: Before the round; its arrays may be written into.
            release: All that left the devices; `release.spec.gather` and `.scatter` go between (P_full,) and (P,).
        """


class ServerOptimizer(Strategy):
    """A strategy that takes the noised mean for a gradient and changes the round's coordinates alone."""

    def step(self, state: StrategyState, release: Release) -> tuple[StrategyState, dict[str, float]]:
        """Gather the round's coordinates, update them, write them back; all others stay untouched."""
        spec = release.spec
        slots = {name: spec.gather(array) for name, array in state.slots.items()}
        now = StrategyState(spec.gather(state.values), slots, state.num_steps + 1)
        values, diagnostics = self.update(now, release)
        spec.scatter(state.values, values)
        for name, array in state.slots.items():
            spec.scatter(array, slots[name])
        return replace(state, num_steps=now.num_steps), diagnostics

    @abstractmethod
    def update(self, state: StrategyState, release: Release) -> tuple[Vector, dict[str, float]]:
        """Return the new values (P,) of the round's coordinates, and public diagnostics.

        Arguments:
            state: `values` and `slots` hold the round's coordinates (P,), the slots to be updated in place; `num_steps`
                counts this round, from 1.
            release: Of the round; `mean` (P,) may be written into.
        """
