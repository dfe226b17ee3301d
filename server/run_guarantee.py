"""What a run guarantees: the plan's own words, and a stamp where devices are copies of the corpus's users."""

from __future__ import annotations

from typing import Any

from fedlm.example_dp.device_budget import device_budget
from fedlm.experiment import Experiment
from fedlm.privacy.guarantee import Guarantee, to_dict
from fedlm.privacy.plan import PrivacyPlan


def devices_and_users(experiment: Experiment) -> dict[str, int]:
    """Return how many devices the fleet has and how many users of the corpus they hold."""
    num_devices = experiment.canaries.first_device
    return {"devices": num_devices, "users": min(num_devices, len(experiment.store.users("train")))}


def run_guarantee(plan: PrivacyPlan, experiment: Experiment) -> Guarantee:
    """Return the plan's guarantee with the warnings that this fleet adds: of copies and of canaries."""
    found = devices_and_users(experiment)
    devices, users, canaries = found["devices"], found["users"], experiment.canaries.count
    warnings = []
    if devices != users:
        warnings.append(
            f"PER DEVICE: {devices:,} devices hold copies of the text of {users:,} users of the corpus, up to "
            f"{-(-devices // users):,} devices a user; epsilon covers one device, not a user of the corpus"
        )
    if canaries:
        warnings.append(f"AUDIT: {canaries:,} canary devices take part")
    return plan.guarantee().warned(*warnings)


def privacy_figures(plan: PrivacyPlan, experiment: Experiment) -> dict[str, Any]:
    """Return the run's guarantee and what it rests on, and apart from it what devices guarantee for their sequences."""
    budget = device_budget(experiment.config)
    on_devices = {"example_level": {**to_dict(budget.guarantee()), **budget.parameters()}} if budget else {}
    return {**to_dict(run_guarantee(plan, experiment)), **plan.parameters(), **on_devices}
