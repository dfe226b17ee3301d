"""What a plan promises its users in words, with the stamps that take it back where it does not hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedlm.privacy.guarantee import Guarantee, large_delta
from fedlm.registry import MECHANISMS
from fedlm.rounding import rounded_up

if TYPE_CHECKING:
    from fedlm.privacy.plan_parameters import PrivacyTerms

_ACCOUNTANTS = {
    "pld": "PLD accounting",
    "rdp": "RDP accounting",
    "gaussian": "accounting of the Gaussian mechanism in closed form",
}
UNIT = "user (all data of one device)"


def stamps(terms: PrivacyTerms) -> tuple[str, ...]:
    """Return the warnings that everything made under these terms carries; none if the guarantee is real."""
    if not terms.enabled:
        return ("NOT PRIVATE: privacy.enabled is false, updates are neither clipped nor noised",)
    found = []
    if terms.reproducible_noise:
        found.append("NOT PRIVATE: privacy.reproducible_noise is on, who knows the seed can subtract the noise")
    if terms.reproducible_cohorts and terms.cohorts_are_secret and not (terms.mimics or terms.reproducible_noise):
        sampled, known = terms.epsilon(terms.rounds), terms.epsilon_with_known_cohorts(terms.rounds)
        found.append(
            f"COHORTS NOT SECRET: privacy.reproducible_cohorts is on, who knows the seed knows who was sampled when; "
            f"without amplification by sampling epsilon is {rounded_up(known)} at delta {terms.delta:g}, not "
            f"{rounded_up(sampled)}"
        )
    if terms.epsilon_as_published is not None:
        found.append(
            f"noise allocated as published: its accounting would claim epsilon "
            f"{rounded_up(terms.epsilon_as_published)}; the least noise that a group can get, "
            f"{terms.adaptation.noise_floor:g} of the nominal, makes it {rounded_up(terms.epsilon(terms.rounds))}"
        )
    if terms.mimics:
        accounted, real = terms.epsilon(terms.rounds), terms.epsilon_of_this_fleet(terms.rounds)
        found.append(
            f"no guarantee for this model: epsilon {rounded_up(accounted)} is that of {terms.expected_cohort:,} of "
            f"{terms.population:,} users a round; the simulated {terms.cohort:,} of {terms.fleet_size:,} got "
            f"epsilon {rounded_up(real)}"
        )
    found += large_delta(terms.delta, terms.population, things="users", key="privacy.delta")
    return tuple(found)


def guarantee(terms: PrivacyTerms) -> Guarantee:
    """Return what all releases of a run under these terms guarantee each user, with the stamps."""
    return Guarantee(
        unit=UNIT,
        adjacency=terms.mechanism.adjacency,
        epsilon=terms.epsilon(terms.rounds),
        delta=terms.delta,
        sentences=_sentences(terms) if terms.enabled else (),
        warnings=stamps(terms),
    )


def _sentences(terms: PrivacyTerms) -> tuple[str, ...]:
    """Return the guarantee with every figure it rests on, and against whom it holds."""
    epsilon = rounded_up(terms.epsilon(terms.rounds))
    guarantee = (
        f"User-level differential privacy with epsilon {epsilon} at delta {terms.delta:g} (unit: {UNIT}; "
        f"adjacency: {terms.mechanism.adjacency}) for all {terms.rounds:,} releases together: "
        f"{terms.mechanism.description}, noise multiplier z = {terms.noise_multiplier:.4g}, "
        f"{_clip(terms)}{_queries(terms)}, {_ACCOUNTANTS.get(terms.accountant, terms.accountant)}."
    )
    secret = "It holds against those who see only the releases"
    if terms.cohorts_are_secret:
        secret += " and do not know the cohorts"
    return (guarantee, f"{secret}.", *_server(terms))


def _server(terms: PrivacyTerms) -> tuple[str, ...]:
    """Return what holds against the server, where the devices add the noise."""
    epsilon = terms.epsilon_server
    return () if epsilon is None else (terms.mechanism.server_statement(epsilon),)


def _clip(terms: PrivacyTerms) -> str:
    rule, first = terms.adaptation, f"clip norm C = {terms.clip_norm:g}"
    if rule.clip_quantile:
        return f"{first} at first, then following the {rule.clip_quantile:g} quantile of update norms"
    return first


def _queries(terms: PrivacyTerms) -> str:
    """Return which further queries share the noise; the update's own part of it is then larger."""
    rule = terms.adaptation
    asked = {
        "the clip bit": rule.clip_quantile,
        "the blocks' shares": rule.allocation == "adaptive",
        f"word maps in the first {rule.selection_rounds} rounds": rule.selection_rounds,
        f"metrics ({', '.join(rule.metrics)})": rule.metrics,
    }
    names = [name for name, is_asked in asked.items() if is_asked]
    return f"; {', '.join(names)} included" if names else ""


def parameters(terms: PrivacyTerms) -> dict[str, object]:
    """Return what the guarantee rests on as JSON-ready values; infinities are None, no secret is among them."""
    return {
        "enabled": terms.enabled,
        "sampler": terms.mechanism.participation.sampler,
        "mechanism": MECHANISMS.reference(type(terms.mechanism)),
        "accountant": terms.accountant,
        "allocation": terms.adaptation.allocation,
        "prefix_rmse": terms.mechanism.prefix_rmse() * terms.noise_multiplier,
        "epsilon_of_this_fleet": _finite(terms.epsilon_of_this_fleet(terms.rounds)),
        "epsilon_server": _finite(math.inf if terms.epsilon_server is None else terms.epsilon_server),
        "epsilon_as_published": _finite(terms.epsilon_as_published or math.inf),
        "epsilon_target": terms.epsilon_target,
        "noise_multiplier": terms.noise_multiplier,
        "clip_norm": _finite(terms.clip_norm),
        "rounds": terms.rounds,
        "sampling_probability": terms.sampling_probability,
        "population": terms.population,
        "expected_cohort": terms.expected_cohort,
        "fleet_size": terms.fleet_size,
        "cohort": terms.cohort,
        "reproducible_noise": terms.reproducible_noise,
        "reproducible_cohorts": terms.reproducible_cohorts,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
