"""Check 2: record and replay. One device changes each round by at most C / n, given equal earlier releases.

The guarantee of T rounds together rests on a bound for each round *given the earlier releases* (adaptive composition).
So a world is recorded without the device; then each round is run with it, on a past that is replayed with the recorded
releases: whatever the device did in earlier rounds may have left no other trace than these.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedlm.privacy.testkit.failure import PrivacyTestFailure
from fedlm.privacy.testkit.subject import Make, Outcome, Setting
from fedlm.privacy.testkit.worlds import CROWDS, SLACK, Crowd, ask, ask_replay, device_update, distance, probes
from fedlm.trainable.spec import Vector

SETTING = Setting(
    size=64, fleet_size=24, cohort=8, clip_norm=0.5, noise_multiplier=1.0, rounds=6, seed=12, reproducible=True
)

Story = Callable[[Setting, int, int], Vector | None]
"""What the device computes: (setting, device, round) -> update, or None where it drops out."""


def _hostile(setting: Setting, device: int, round_number: int) -> Vector:
    found = list(probes(setting, round_number).values())
    return found[(7 * round_number) % len(found)]


STORIES: dict[str, Story] = {
    "an ordinary device": lambda setting, device, t: device_update(setting, device, t, 0.5),
    "a hostile device": _hostile,
    "a device with huge updates": lambda setting, device, t: device_update(setting, device, t, 1e3),
    "a device of the first round only": lambda setting, device, t: (
        device_update(setting, device, t, 1e3) if t == 1 else None
    ),
}


def sensitivity(make: Make) -> None:
    """Replay neighbouring fleets with the same noise: with and without one device, ordinary or hostile.

    Arguments:
        make: Makes the runs under examination.

    Raises:
        PrivacyTestFailure: A round changed by more than (1 + 1e-3) C / n; or changed at all though the device was not
            in it; or claims another noise; or the same fleet twice did not give the same release.

    Guarantee:
        No false alarms: with reproducible noise nothing is drawn. Six rounds; four stories of the device that is
        sampled most often, and a device of each round's cohort, so that cohorts smaller than n are among them.
    """
    for crowd in CROWDS:
        _neighbours(make, SETTING, crowd)


def _neighbours(make: Make, setting: Setting, crowd: str) -> None:
    cohorts = [make(setting).sample_cohort(t) for t in range(1, setting.rounds + 1)]
    often = int(np.bincount(np.concatenate(cohorts)).argmax())
    recorded = _record(make, setting, CROWDS[crowd], often)
    for story in STORIES:
        for now in range(1, setting.rounds + 1):
            _compare(make, setting, crowd, often, story, recorded[:now])
    for now, cohort in enumerate(cohorts, start=1):
        for device in cohort[-1:]:
            recorded = _record(make, setting, CROWDS[crowd], int(device))
            _compare(make, setting, crowd, int(device), "a device with huge updates", recorded[:now])


def _record(make: Make, setting: Setting, crowd: Crowd, device: int) -> list[Outcome]:
    """Run the world without the device, twice; without equal releases there is nothing to compare."""
    worlds = []
    for _ in range(2):
        subject = make(setting)
        rounds = range(1, setting.rounds + 1)
        worlds.append([ask(subject, t, _updates(make, setting, crowd, device, t, None), "recorded") for t in rounds])
    for t, (one, other) in enumerate(zip(*worlds, strict=True), start=1):
        if one.release.tobytes() != other.release.tobytes():
            raise PrivacyTestFailure(
                f"record and replay: round {t} of the same fleet, seed and reproducible noise gave two releases "
                f"that differ by {float(np.abs(one.release - other.release).max()):.4g}; sensitivity cannot be measured"
            )
    return worlds[0]


def _updates(
    make: Make, setting: Setting, crowd: Crowd, device: int, round_number: int, story: Story | None
) -> dict[int, Vector]:
    cohort = make(setting).sample_cohort(round_number)
    updates = crowd(setting, cohort[cohort != device], round_number)
    if story and device in cohort and (update := story(setting, device, round_number)) is not None:
        updates = dict(sorted((updates | {device: update}).items()))
    return updates


def _compare(make: Make, setting: Setting, crowd: str, device: int, story: str, recorded: list[Outcome]) -> None:
    """Run the last recorded round with the device, on the recorded past."""
    subject, now = make(setting), len(recorded)
    for t in range(1, now):
        past = _updates(make, setting, CROWDS[crowd], device, t, STORIES[story])
        ask_replay(subject, t, past, recorded[t - 1])
    updates = _updates(make, setting, CROWDS[crowd], device, now, STORIES[story])
    outcome = ask(subject, now, updates, f"{story}; {crowd}")
    if not np.array_equal(outcome.std, recorded[-1].std):
        raise PrivacyTestFailure(
            f"record and replay: {story} ({crowd}) changes the noise's std of round {now} from "
            f"{np.max(recorded[-1].std):.6g} to {np.max(outcome.std):.6g}; it must follow from earlier releases alone"
        )
    change, allowed = distance(outcome, recorded[-1], subject.claim.noise_multiplier), float(device in updates)
    if not change <= allowed * (1 + SLACK) + SLACK * (1 - allowed):
        raise PrivacyTestFailure(
            f"record and replay: {story} ({crowd}) changes the release of round {now} by {change:.4g} C / n, "
            f"allowed is {allowed:.0f} given equal earlier releases"
        )
