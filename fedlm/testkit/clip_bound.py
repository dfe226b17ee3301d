"""Check 1: whatever a device computes, it moves a round's release by at most C / n."""

from __future__ import annotations

from dataclasses import replace

from fedlm.testkit.failure import PrivacyTestFailure
from fedlm.testkit.subject import Make, Setting
from fedlm.testkit.worlds import CROWDS, SLACK, ask, distance, drawn_probes, joined, probes, without
from fedlm.trainable.spec import Vector

SETTING = Setting(
    size=64, fleet_size=24, cohort=8, clip_norm=0.5, noise_multiplier=1.0, rounds=4, seed=11, reproducible=True
)
_DRAWN = 60


def clip_bound(make: Make) -> None:
    """Add one device with a hostile update to fleets of several kinds, with the same noise, and measure the change.

    Arguments:
        make: Makes the runs under examination.

    Raises:
        PrivacyTestFailure: A round failed, was not finite, or changed by more than (1 + 1e-3) C / n.

    Guarantee:
        No false alarms: with reproducible noise nothing is drawn. Updates: NaN, infinities, zero, denormal, tiny, at
        and around the bound, norms that overflow fp16 and fp32, single blocks and coordinates, opposed to the others,
        and 60 of drawn scale and sparsity; the device comes first and last; C is 0.5 and 40.
    """
    for setting in (SETTING, replace(SETTING, clip_norm=40.0)):
        named, drawn = probes(setting), drawn_probes(setting, _DRAWN)
        for crowd in CROWDS:
            for place in (0, -1):
                _one_device(make, setting, crowd, place, named | (drawn if crowd == "an ordinary cohort" else {}))


def _one_device(make: Make, setting: Setting, crowd: str, place: int, updates: dict[str, Vector]) -> None:
    first = make(setting)
    cohort = first.sample_cohort(1)
    device = int(cohort[place])
    others = CROWDS[crowd](setting, cohort[cohort != device], 1)
    neighbour = ask(first, 1, without(first.claim, others, device, setting.size), crowd)
    for name, update in updates.items():
        subject = make(setting)
        outcome = ask(subject, 1, joined(others, device, update), f"{name}; {crowd}")
        change = distance(outcome, neighbour, subject.claim, len(others) + 1)
        if not change <= 1 + SLACK:
            raise PrivacyTestFailure(
                f"clip bound: a device with {name} ({crowd}) changes the release by {change:.4g} C / n, allowed is 1"
            )
