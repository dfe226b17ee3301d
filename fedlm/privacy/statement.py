"""What a plan promises its users in words, with the stamps that take it back where it does not hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedlm.privacy.guarantee import Guarantee, large_delta
from fedlm.registry import MECHANISMS
from fedlm.rounding import rounded_up

if TYPE_CHECKING:
    from fedlm.privacy.plan_parameters import PlanParameters

_ACCOUNTANTS = {
    "pld": "PLD accounting",
    "rdp": "RDP accounting",
    "gaussian": "accounting of the Gaussian mechanism in closed form",
}
UNIT = "user (all data of one device)"


def stamps(plan_parameters: PlanParameters) -> tuple[str, ...]:
    """Return the warnings that everything made under these terms carries; none if the guarantee is real."""
    if not plan_parameters.enabled:
        return ("NOT PRIVATE: privacy.enabled is false, updates are neither clipped nor noised",)
    found = []
    if plan_parameters.reproducible_noise:
        found.append("NOT PRIVATE: privacy.reproducible_noise is on, who knows the seed can subtract the noise")
    if (
        plan_parameters.reproducible_cohorts
        and plan_parameters.cohorts_are_secret
        and not (plan_parameters.mimics or plan_parameters.reproducible_noise)
    ):
        sampled, known = (
            plan_parameters.epsilon(plan_parameters.rounds),
            plan_parameters.epsilon_with_known_cohorts(plan_parameters.rounds),
        )
        found.append(
            f"COHORTS NOT SECRET: privacy.reproducible_cohorts is on, who knows the seed knows who was sampled when; "
            f"without amplification by sampling epsilon is {rounded_up(known)} at delta {plan_parameters.delta:g}, not "
            f"{rounded_up(sampled)}"
        )
    if plan_parameters.epsilon_as_published is not None:
        found.append(
            f"noise allocated as published: its accounting would claim epsilon "
            f"{rounded_up(plan_parameters.epsilon_as_published)}; the least noise that a group can get, "
            f"{plan_parameters.adaptive_rule.noise_floor:g} of the nominal, makes it "
            f"{rounded_up(plan_parameters.epsilon(plan_parameters.rounds))}"
        )
    if plan_parameters.mimics:
        accounted, real = (
            plan_parameters.epsilon(plan_parameters.rounds),
            plan_parameters.epsilon_of_this_fleet(plan_parameters.rounds),
        )
        found.append(
            f"no guarantee for this model: epsilon {rounded_up(accounted)} is that of "
            f"{plan_parameters.expected_cohort:,} of "
            f"{plan_parameters.population:,} users a round; the simulated {plan_parameters.cohort:,} of "
            f"{plan_parameters.fleet_size:,} got "
            f"epsilon {rounded_up(real)}"
        )
    found += large_delta(plan_parameters.delta, plan_parameters.population, things="users", key="privacy.delta")
    return tuple(found)


def guarantee(plan_parameters: PlanParameters) -> Guarantee:
    """Return what all releases of a run under these terms guarantee each user, with the stamps."""
    return Guarantee(
        unit=UNIT,
        adjacency=plan_parameters.mechanism.adjacency,
        epsilon=plan_parameters.epsilon(plan_parameters.rounds),
        delta=plan_parameters.delta,
        sentences=_sentences(plan_parameters) if plan_parameters.enabled else (),
        warnings=stamps(plan_parameters),
    )


def _sentences(plan_parameters: PlanParameters) -> tuple[str, ...]:
    """Return the guarantee with every figure it rests on, and against whom it holds."""
    epsilon = rounded_up(plan_parameters.epsilon(plan_parameters.rounds))
    guarantee = (
        f"User-level differential privacy with epsilon {epsilon} at delta {plan_parameters.delta:g} (unit: {UNIT}; "
        f"adjacency: {plan_parameters.mechanism.adjacency}) for all {plan_parameters.rounds:,} releases together: "
        f"{plan_parameters.mechanism.description}, noise multiplier z = {plan_parameters.noise_multiplier:.4g}, "
        f"{_clip(plan_parameters)}{_queries(plan_parameters)}, "
        f"{_ACCOUNTANTS.get(plan_parameters.accountant, plan_parameters.accountant)}."
    )
    secret = "It holds against those who see only the releases"
    if plan_parameters.cohorts_are_secret:
        secret += " and do not know the cohorts"
    return (guarantee, f"{secret}.", *_server(plan_parameters))


def _server(plan_parameters: PlanParameters) -> tuple[str, ...]:
    """Return what holds against the server, where the devices add the noise."""
    epsilon = plan_parameters.epsilon_server
    return () if epsilon is None else (plan_parameters.mechanism.server_statement(epsilon),)


def _clip(plan_parameters: PlanParameters) -> str:
    rule, first = plan_parameters.adaptive_rule, f"clip norm C = {plan_parameters.clip_norm:g}"
    if rule.clip_quantile:
        return f"{first} at first, then following the {rule.clip_quantile:g} quantile of update norms"
    return first


def _queries(plan_parameters: PlanParameters) -> str:
    """Return which further queries share the noise; the update's own part of it is then larger."""
    rule = plan_parameters.adaptive_rule
    asked = {
        "the clip bit": rule.clip_quantile,
        "the blocks' shares": rule.allocation == "adaptive",
        f"word maps in the first {rule.selection_rounds} rounds": rule.selection_rounds,
        f"metrics ({', '.join(rule.metrics)})": rule.metrics,
    }
    names = [name for name, is_asked in asked.items() if is_asked]
    return f"; {', '.join(names)} included" if names else ""


def parameters(plan_parameters: PlanParameters) -> dict[str, object]:
    """Return what the guarantee rests on as JSON-ready values; infinities are None, no secret is among them."""
    return {
        "enabled": plan_parameters.enabled,
        "sampler": plan_parameters.mechanism.participation.sampler,
        "mechanism": MECHANISMS.reference(type(plan_parameters.mechanism)),
        "accountant": plan_parameters.accountant,
        "allocation": plan_parameters.adaptive_rule.allocation,
        "prefix_rmse": plan_parameters.mechanism.prefix_rmse() * plan_parameters.noise_multiplier,
        "epsilon_of_this_fleet": _finite(plan_parameters.epsilon_of_this_fleet(plan_parameters.rounds)),
        "epsilon_server": _finite(
            math.inf if plan_parameters.epsilon_server is None else plan_parameters.epsilon_server
        ),
        "epsilon_as_published": _finite(plan_parameters.epsilon_as_published or math.inf),
        "epsilon_target": plan_parameters.epsilon_target,
        "noise_multiplier": plan_parameters.noise_multiplier,
        "clip_norm": _finite(plan_parameters.clip_norm),
        "rounds": plan_parameters.rounds,
        "sampling_probability": plan_parameters.sampling_probability,
        "population": plan_parameters.population,
        "expected_cohort": plan_parameters.expected_cohort,
        "fleet_size": plan_parameters.fleet_size,
        "cohort": plan_parameters.cohort,
        "reproducible_noise": plan_parameters.reproducible_noise,
        "reproducible_cohorts": plan_parameters.reproducible_cohorts,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
