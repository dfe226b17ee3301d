"""The contract that aggregation strategies fulfil: `init`, `accumulate`, `finish`, over a stream of contributions.

A strategy never holds more than its state and one contribution, so memory does not grow with the cohort. It sees the
cohort's sum only through `Release.mean`, which the privacy plan answers once: clipped, noised, divided by the expected
cohort. Everything after that is post-processing and costs no privacy.

A plug-in needs this module alone:

    class MyStrategy(SumStrategy):
        def step(self, state, values, mean):
            return values + 0.5 * mean, {}

and `strategy.kind = "mypkg.strategies:MyStrategy"` in the TOML file. A class attribute `Options`, a frozen dataclass,
gives it options of its own: [strategy.options] in the file, `self.options` here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from fedlm.config.keys import typed_options
from fedlm.config.schema import StrategyConfig
from fedlm.privacy.clipping import ClippedSum
from fedlm.registry import NoOptions
from fedlm.trainable.spec import UpdateSpec, Vector

State = TypeVar("State", bound="StrategyState")


@dataclass(frozen=True)
class StrategyState:
    """Everything a strategy carries from round to round; checkpoints store it.

    Arguments:
        values: (P_full,) the model's trainable values.
        slots: Optimiser arrays of the full size (P_full,), by name. `finish` may write into them in place: the engine
            gives up its own reference.
        num_steps: Rounds finished.
        total: The cohort's sum so far; None between rounds.
    """

    values: Vector
    slots: Mapping[str, Vector] = field(default_factory=dict)
    num_steps: int = 0
    total: ClippedSum | None = None


@dataclass(frozen=True)
class Release:
    """What `finish` may use.

    Arguments:
        spec: The round's spec.
        mean: Answers once with the noised mean update (P,) of a sum.
    """

    spec: UpdateSpec
    mean: Callable[[ClippedSum], Vector]


@runtime_checkable
class Strategy(Protocol):
    """A streaming aggregation strategy; construct with a `StrategyConfig`."""

    def init(self, spec: UpdateSpec, values: Vector) -> StrategyState:
        """Return the first state; `spec` is the full spec, `values` (P_full,)."""
        ...

    def accumulate(self, state: StrategyState, contribution: ClippedSum) -> StrategyState:
        """Take in one contribution, a sum over one or more devices."""
        ...

    def finish(self, state: StrategyState, release: Release) -> tuple[StrategyState, dict[str, float]]:
        """End the round: return the next state and public diagnostics."""
        ...


class SumStrategy(ABC):
    """A strategy that sums the cohort and applies `step` to the noised mean; the base of FedAvg and FedAdam."""

    slot_names: tuple[str, ...] = ()
    Options: ClassVar[type] = NoOptions
    """What [strategy.options] may hold: a frozen dataclass whose fields are made with `fedlm.config.schema.option`."""
    optimizer: ClassVar[str] = "sgd"
    """How a step scales the noise of a release (`fedlm.models.noise_levels.step_variance`)."""

    def __init__(self, config: StrategyConfig) -> None:
        self.config = config
        self.options: Any = typed_options(type(self), config.options, "strategy.options")

    def init(self, spec: UpdateSpec, values: Vector) -> StrategyState:
        """Return a state whose optimiser arrays are zero."""
        import numpy as np

        return StrategyState(values, {name: np.zeros(spec.size, np.float32) for name in self.slot_names})

    def accumulate(self, state: StrategyState, contribution: ClippedSum) -> StrategyState:
        """Add a contribution to the running sum, exactly (integers), so that order does not matter."""
        if state.total is None:
            return replace(state, total=contribution)
        state.total.add_sum(contribution)
        return state

    def finish(self, state: StrategyState, release: Release) -> tuple[StrategyState, dict[str, float]]:
        """Release the mean and write the stepped values of this round's coordinates back; others stay untouched."""
        assert state.total is not None, "the engine opens every round with an empty sum"
        mean = release.mean(state.total)
        slots = {name: release.spec.gather(array) for name, array in state.slots.items()}
        values = release.spec.gather(state.values)
        values, diagnostics = self.step(replace(state, slots=slots, num_steps=state.num_steps + 1), values, mean)
        release.spec.scatter(state.values, values)
        for name, array in state.slots.items():
            release.spec.scatter(array, slots[name])
        return replace(state, num_steps=state.num_steps + 1, total=None), diagnostics

    @abstractmethod
    def step(self, state: StrategyState, values: Vector, mean: Vector) -> tuple[Vector, dict[str, float]]:
        """Return the new values (P,) of this round's coordinates.

        Arguments:
            state: `slots` hold this round's coordinates (P,) and are updated in place; `num_steps` counts from 1.
            values: (P,) before the round.
            mean: (P,) the noised mean update.
        """
