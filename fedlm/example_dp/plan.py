"""The plan of an example-level DP-SGD run: sampler, clip rule, noise and accounting, made together or not at all.

A step takes each of the n examples with probability q = batch size / n, each by its own coin (Poisson), sums their
gradients clipped to C, adds N(0, (z C)^2) to every coordinate and divides by the *expected* batch size q n (Abadi et
al. 2016, https://arxiv.org/abs/1607.00133). A run has one or more phases, which may train different parameters
(X+BiTFiT: all of them, then biases alone); what they cost together is `fedlm.privacy.accounting.composition`.

>>> from fedlm.config.schema import ExampleDpConfig
>>> config = ExampleDpConfig(enabled=True, epsilon=3.0, delta=1e-5)
>>> plan = ExamplePlan.create(config, num_examples=10_000, batch_size=250, steps=(40, 80))
>>> round(plan.epsilon(40), 1), round(plan.epsilon(120), 1)
(2.2, 3.0)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
from randomgen import AESCounter
from torch import Tensor

from fedlm.config.schema import ExampleDpConfig
from fedlm.errors import BudgetExceededError, ConfigError
from fedlm.example_dp.clip_rule import ClipRule
from fedlm.example_dp.release import check_sums, noised_means
from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.privacy.accounting.composition import Event, composed_epsilon
from fedlm.privacy.guarantee import Guarantee, check_budget, large_delta
from fedlm.privacy.noise.fixed_point import CAPACITY, UNITS
from fedlm.privacy.noise.lattice import MAX_STD, NoiseStream, Uncopied, fresh_key, reproducible_key
from fedlm.privacy.released_once import ReleasedOnce
from fedlm.ranges import require_count, require_number
from fedlm.rounding import rounded_up

_COINS = 2.0**53  # values of a coin: a uniform double is a multiple of 2^-53
_CLIP_NORMS = (1e-9, 1e9)  # float32 squares gradients of that size without underflow or overflow
_LARGEST_BATCH = CAPACITY // 2  # expected; what is sampled beyond CAPACITY would not fit the lattice


@dataclass(frozen=True)
class Phase:
    """Steps with the same noise.

    Arguments:
        steps: How many.
        noise_multiplier: z, the noise's standard deviation in units of the clip norm; 0 only without privacy.
    """

    steps: int
    noise_multiplier: float


@dataclass(frozen=True, eq=False)
class ExamplePlan(Uncopied):
    """The only way to sample examples and to release a step; made by `create`.

    Arguments:
        num_examples: n.
        batch_size: Expected examples of a step, q n; need not be whole.
        phases: One after the other.
        delta: Of the guarantee.
        rule: How a gradient is clipped; its clip norm is infinite when the plan is not private.
        divisor: What sums are divided by, a public number; 0: the expected batch size, which tells n.
        epsilon_target: What the noise was calibrated to or must not exceed; 0: neither.
        seed: What sample and noise follow from when the plan is reproducible or not private.
        reproducible: Debugging: NOT PRIVATE.

    Guarantee:
        All results of `release` together are (epsilon(num_steps), delta)-differentially private with respect to adding
        or removing one example, for those who know n, if each step's sums are those of exactly the sampled examples'
        gradients under `rule`, in exact arithmetic, each gradient a function of its own example, of earlier releases
        and of draws that do not depend on the data, and nothing else leaves.

    Edge cases:
        An empty sample releases noise; non-finite sums raise before anything is released; each step is released once,
        steps beyond the plan are refused; plans are neither copied nor pickled, and a new one samples anew.

    Raises:
        ConfigError: A number out of range.
    """

    num_examples: int
    batch_size: float
    phases: tuple[Phase, ...]
    delta: float
    rule: ClipRule
    divisor: float = 0.0
    epsilon_target: float = 0.0
    seed: int = field(default=0, repr=False)
    reproducible: bool = False
    _keys: StepKeys = field(init=False, repr=False)
    _released: ReleasedOnce = field(init=False, repr=False, default_factory=partial(ReleasedOnce, "step"))

    def __post_init__(self) -> None:
        """Check every number."""
        require_count("number of examples", self.num_examples, low=1, fix="add data")
        most = min(self.num_examples, _LARGEST_BATCH)
        require_number("batch_size", self.batch_size, above=0, high=most, fix="it is expected of these examples")
        for phase in self.phases:
            require_count("steps", phase.steps)
            require_number("noise multiplier", phase.noise_multiplier, low=0, high=MAX_STD / UNITS, fix="raise epsilon")
        require_count("steps of all phases", self.num_steps, low=1, fix="train more epochs")
        require_number("divisor", self.divisor, low=0)
        require_number("example_dp.delta", self.delta, low=subsampled_gaussian.MIN_DELTA, high=0.1)
        require_number("example_dp.epsilon", self.epsilon_target, low=0)
        if self.is_private:
            low, high = _CLIP_NORMS
            require_number("example_dp.clip_norm", self.rule.clip_norm, low=low, high=high)
        if any((phase.noise_multiplier > 0) != self.is_private for phase in self.phases):
            raise ConfigError(
                f"clip norm {self.rule.clip_norm:g} and noise multipliers "
                f"{[phase.noise_multiplier for phase in self.phases]} contradict each other; give both, or an infinite "
                "clip norm and no noise"
            )
        known = self.reproducible or not self.is_private
        object.__setattr__(self, "_keys", StepKeys(self.seed if known else None))

    @classmethod
    def create(
        cls,
        config: ExampleDpConfig,
        *,
        num_examples: int,
        batch_size: float,
        steps: tuple[int, ...],
        seed: int = 0,
        reproducible: bool = False,
    ) -> ExamplePlan:
        """Return the plan of a run; one noise multiplier for all phases, calibrated to epsilon unless it is given.

        Arguments:
            config: The section example_dp. Not enabled: neither clipping nor noise, stamped NOT PRIVATE.
            num_examples: n.
            batch_size: Expected examples of a step.
            steps: Of each phase.
            seed: The experiment's; used only if reproducible or not enabled.
            reproducible: `privacy.reproducible_noise`.

        Raises:
            ConfigError: A number out of range, or neither epsilon nor noise multiplier.
            BudgetExceededError: Both are given and the steps cost more than epsilon.
        """
        require_count("number of examples", num_examples, low=1, fix="add data")
        require_number("batch_size", batch_size, above=0, high=num_examples, fix=f"there are {num_examples:,} examples")
        z = _noise_multiplier(config, batch_size / num_examples, sum(steps)) if config.enabled else 0.0
        plan = cls(
            num_examples=num_examples,
            batch_size=batch_size,
            phases=tuple(Phase(count, z) for count in steps),
            delta=config.delta,
            rule=ClipRule(config.clipping, config.clip_norm) if config.enabled else ClipRule("flat", math.inf),
            epsilon_target=config.epsilon if config.enabled else 0.0,
            seed=seed,
            reproducible=reproducible,
        )
        if plan.is_private:
            check_budget(
                plan.epsilon(plan.num_steps),
                plan.epsilon_target,
                what=f"noise multiplier {z:.4g} over {plan.num_steps:,} steps",
                fix="set example_dp.noise_multiplier = 0 to calibrate it, or example_dp.epsilon = 0 to accept the cost",
            )
        return plan

    @property
    def is_private(self) -> bool:
        """Whether gradients are clipped and noised."""
        return math.isfinite(self.rule.clip_norm)

    @property
    def sampling_probability(self) -> float:
        """q, of each example in each step."""
        return self.batch_size / self.num_examples

    @property
    def num_steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def guarantee(self) -> Guarantee:
        """Return what all steps together guarantee each example."""
        return guarantee(self)

    def parameters(self) -> dict[str, object]:
        """Return the public numbers that the guarantee rests on, JSON-ready."""
        return parameters(self)

    def phase_steps(self, phase: int) -> range:
        """Return the steps of a phase, both counted from 0."""
        require_count("phase", phase, high=len(self.phases) - 1)
        start = sum(earlier.steps for earlier in self.phases[:phase])
        return range(start, start + self.phases[phase].steps)

    def noise_std(self, step: int) -> float:
        """Return the standard deviation of a coordinate of a step's release, z C / divisor; 0 when not private."""
        z = self._noise_multiplier_of(step)
        return z * self.rule.clip_norm / self._divisor if self.is_private else 0.0

    def epsilon(self, steps_done: int) -> float:
        """Return epsilon at `delta` of the first `steps_done` releases; infinity when not private."""
        require_count("steps done", steps_done, high=self.num_steps)
        if not self.is_private:
            return math.inf
        events = []
        for index, phase in enumerate(self.phases):
            done = min(max(0, steps_done - self.phase_steps(index).start), phase.steps)
            events.append(Event(self.sampling_probability, phase.noise_multiplier, done))
        return composed_epsilon(events, self.delta)

    def sample(self, step: int) -> npt.NDArray[np.int64]:
        """Return the sorted indices of a step's examples, possibly none; the same ones at each call.

        Arguments:
            step: Counted from 0 over all phases.

        Guarantee:
            Each example is in with probability q on its own, from a key that only this object has; who was sampled,
            and how many, is as private as the data.
        """
        self._check_step(step)
        generator = np.random.Generator(AESCounter(key=self._keys.sampling(step)))
        q = math.floor(self.sampling_probability * _COINS) / _COINS  # rounded down: never above what is accounted for
        return np.flatnonzero(generator.random(self.num_examples) < q)

    def step_secret(self, step: int) -> bytes:
        """Return the 32 bytes that a task's own draws in a step follow from (`Task.begin_step`)."""
        self._check_step(step)
        return self._keys.draws(step)

    def release(self, sums: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return the noised mean gradient of a step: the only thing of the data that may leave.

        Arguments:
            sums: Clipped sums of *all* trained parameters, float32 or float64; overwritten.
            step: Counted from 0 over all phases; each once.

        Returns:
            By name in the shapes of the sums: (sum + N(0, (z C)^2)) / divisor; without noise when not private.

        Raises:
            FedlmError: Sums that are not those of clipped gradients; nothing was released then.
            BudgetExceededError: The step was released before or is beyond the plan.
        """
        self._check_step(step)
        check_sums(sums, self.rule.clip_norm)
        self._released.claim(step)
        if not self.is_private:
            return {name: value.div_(self._divisor) for name, value in sums.items()}
        return noised_means(
            sums,
            clip_norm=self.rule.clip_norm,
            noise_multiplier=self._noise_multiplier_of(step),
            divisor=self._divisor,
            stream=NoiseStream(self._keys.noise(step)),
        )

    @property
    def _divisor(self) -> float:
        return self.divisor or self.batch_size

    def _check_step(self, step: int) -> None:
        require_count("step", step)
        if step >= self.num_steps:
            raise BudgetExceededError(f"all {self.num_steps:,} planned steps were made; plan more at the start")

    def _noise_multiplier_of(self, step: int) -> float:
        self._check_step(step)
        return next(p.noise_multiplier for i, p in enumerate(self.phases) if step in self.phase_steps(i))


def _noise_multiplier(config: ExampleDpConfig, sampling_probability: float, steps: int) -> float:
    """Return z as given, or calibrated to epsilon."""
    if config.noise_multiplier:
        return require_number("example_dp.noise_multiplier", config.noise_multiplier, above=0)
    if not config.epsilon:
        raise ConfigError("example_dp.epsilon = 0 and example_dp.noise_multiplier = 0; give one of them")
    require_number("example_dp.delta", config.delta, low=subsampled_gaussian.MIN_DELTA, high=0.1)
    require_count("steps of all phases", steps, low=1, fix="train more epochs")
    return subsampled_gaussian.noise_multiplier(
        sampling_probability=sampling_probability, rounds=steps, epsilon=config.epsilon, delta=config.delta
    )


UNIT = "example (one sequence or one labelled text)"
ADJACENCY = "add or remove one"


def _stamps(plan: ExamplePlan) -> tuple[str, ...]:
    """Return the warnings that everything made under this plan carries; none if the guarantee is real."""
    if not plan.is_private:
        return ("NOT PRIVATE: example_dp.enabled is false, gradients are neither clipped nor noised",)
    found = []
    if plan.reproducible:
        found.append("NOT PRIVATE: sample and noise follow from the seed, who knows it can subtract the noise")
    return (*found, *large_delta(plan.delta, plan.num_examples, things="examples", key="example_dp.delta"))


def guarantee(plan: ExamplePlan) -> Guarantee:
    """Return what all steps of a plan guarantee each example, with the stamps."""
    return Guarantee(
        unit=UNIT,
        adjacency=ADJACENCY,
        epsilon=plan.epsilon(plan.num_steps),
        delta=plan.delta,
        sentences=_sentences(plan) if plan.is_private else (),
        warnings=_stamps(plan),
    )


def _sentences(plan: ExamplePlan) -> tuple[str, ...]:
    """Return the guarantee with every figure it rests on, and against whom it holds."""
    noise = sorted({phase.noise_multiplier for phase in plan.phases if phase.steps})
    return (
        f"Example-level differential privacy with epsilon {rounded_up(plan.epsilon(plan.num_steps))} at delta "
        f"{plan.delta:g} (unit: {UNIT}; adjacency: {ADJACENCY}) for all {plan.num_steps:,} steps{_phases(plan)} "
        f"together: DP-SGD, each of {plan.num_examples:,} examples in a step with probability "
        f"q = {plan.sampling_probability:.4g} (Poisson), noise multiplier z = {', '.join(f'{z:.4g}' for z in noise)}, "
        f"{plan.rule.kind} clipping at C = {plan.rule.clip_norm:g}, PLD accounting.",
        "It holds against those who see every step's noised gradient and the model, and who know how many examples "
        "there are; samples, times and non-private metrics must stay secret.",
    )


def parameters(plan: ExamplePlan) -> dict[str, object]:
    """Return what the guarantee rests on as JSON-ready values; infinities are None, no key or seed is among them."""
    return {
        "enabled": plan.is_private,
        "sampler": "poisson",
        "mechanism": "gaussian",
        "accountant": "pld",
        "epsilon_target": plan.epsilon_target,
        "clipping": plan.rule.kind,
        "clip_norm": _finite(plan.rule.clip_norm),
        "num_examples": plan.num_examples,
        "batch_size": plan.batch_size,
        "sampling_probability": plan.sampling_probability,
        "phases": [{"steps": phase.steps, "noise_multiplier": phase.noise_multiplier} for phase in plan.phases],
        "reproducible": plan.reproducible,
    }


def _phases(plan: ExamplePlan) -> str:
    if len(plan.phases) == 1:
        return ""
    return f" of {len(plan.phases)} phases ({' + '.join(f'{phase.steps:,}' for phase in plan.phases)})"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class StepKeys(Uncopied):
    """Keys by step.

    Arguments:
        seed: All keys follow from it, for debugging: NOT PRIVATE. None: from the operating system.
    """

    __slots__ = ("_key", "_seed")

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        secret = fresh_key() if seed is None else reproducible_key(seed, -1)  # no step has the number -1
        self._key = secret.to_bytes(16, "little")

    def sampling(self, step: int) -> int:
        """Return the 128-bit key of a step's Poisson sample, the same at each call."""
        return int.from_bytes(self._derived("sample", step, 16), "little")

    def draws(self, step: int) -> bytes:
        """Return the 32 bytes of `Task.begin_step`, the same at each call."""
        return self._derived("draws", step, 32)

    def noise(self, step: int) -> int:
        """Return a 128-bit key for a step's noise, another one at each call unless reproducible."""
        return fresh_key() if self._seed is None else reproducible_key(self._seed, step)

    def _derived(self, purpose: str, step: int, size: int) -> bytes:
        return blake2b(f"{purpose}/{step}".encode(), key=self._key, digest_size=size).digest()
