"""What an example-level plan promises its examples in words, with the stamps that take it back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedlm.privacy.guarantee import Guarantee, large_delta
from fedlm.rounding import rounded_up

if TYPE_CHECKING:
    from fedlm.example_dp.plan import ExamplePlan

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
