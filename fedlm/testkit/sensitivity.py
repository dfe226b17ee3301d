"""Check 2: record and replay. One device changes each round by at most C / n, given equal earlier releases.

The guarantee of T rounds together rests on a bound for each round *given the earlier releases* (adaptive composition).
So a world is recorded without the device; then each round is run with it, on a past that is replayed with the recorded
releases: whatever the device did in earlier rounds may have left no other trace than these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedlm.testkit.failure import PrivacyTestFailure
from fedlm.testkit.subject import ClaimedGuarantee, Make, Outcome, Setting
from fedlm.testkit.worlds import (
    CROWDS,
    SLACK,
    ask,
    ask_replay,
    device_update,
    distance,
    joined,
    probes,
    without,
)
from fedlm.trainable.spec import RowIds, Vector

SETTING = Setting(
    size=64, fleet_size=24, cohort=8, clip_norm=0.5, noise_multiplier=1.0, rounds=4, seed=12, reproducible=True
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
        No false alarms: with reproducible noise nothing is drawn. Four rounds; four stories of the device that is
        sampled most often, and a device of each round's cohort, so that cohorts smaller than n are among them.
    """
    for crowd in CROWDS:
        _neighbours(make, crowd)


@dataclass(frozen=True)
class _World:
    """A fleet but for one device, which is yet to be chosen.

    Arguments:
        make: Makes the runs under examination.
        crowd: Name of what the others do.
        cohorts: Of rounds 1, 2, ...
        claim: Of the runs.
    """

    make: Make
    crowd: str
    cohorts: tuple[RowIds, ...]
    claim: ClaimedGuarantee

    def updates(self, device: int, round_number: int, story: str) -> dict[int, Vector]:
        """Return a round's updates; without a story the device stays away."""
        cohort = self.cohorts[round_number - 1]
        others = CROWDS[self.crowd](SETTING, cohort[cohort != device], round_number)
        if device not in cohort:
            return others
        update = STORIES[story](SETTING, device, round_number) if story else None
        if update is None:
            return without(self.claim, others, device, SETTING.size)
        return joined(others, device, update)

    def recorded(self, device: int, num_rounds: int) -> list[Outcome]:
        """Run the world without the device."""
        subject = self.make(SETTING)
        return [ask(subject, t, self.updates(device, t, ""), "recorded") for t in range(1, num_rounds + 1)]


def _neighbours(make: Make, crowd: str) -> None:
    subject = make(SETTING)
    cohorts = tuple(subject.sample_cohort(t) for t in range(1, SETTING.rounds + 1))
    world = _World(make, crowd, cohorts, subject.claim)
    often = int(np.bincount(np.concatenate(cohorts)).argmax())
    recorded = world.recorded(often, SETTING.rounds)
    _same_twice(recorded, world.recorded(often, SETTING.rounds))
    for story in STORIES:
        for now in range(1, SETTING.rounds + 1):
            _compare(world, often, story, recorded[:now])
    for now, cohort in enumerate(cohorts, start=1):
        for device in map(int, cohort[-1:]):
            _compare(world, device, "a device with huge updates", world.recorded(device, now))


def _same_twice(worlds: list[Outcome], again: list[Outcome]) -> None:
    """Refuse runs without equal releases: there is nothing to compare."""
    for t, (one, other) in enumerate(zip(worlds, again, strict=True), start=1):
        if one.release.tobytes() != other.release.tobytes():
            raise PrivacyTestFailure(
                f"record and replay: round {t} of the same fleet, seed and reproducible noise gave two releases "
                f"that differ by {float(np.abs(one.release - other.release).max()):.4g}; sensitivity cannot be measured"
            )


def _compare(world: _World, device: int, story: str, recorded: list[Outcome]) -> None:
    """Run the last recorded round with the device, on the recorded past."""
    subject, now = world.make(SETTING), len(recorded)
    for t in range(1, now):
        ask_replay(subject, t, world.updates(device, t, story), recorded[t - 1])
    updates = world.updates(device, now, story)
    outcome = ask(subject, now, updates, f"{story}; {world.crowd}")
    if not np.array_equal(outcome.std, recorded[-1].std):
        raise PrivacyTestFailure(
            f"record and replay: {story} ({world.crowd}) changes the noise's std of round {now} from "
            f"{np.max(recorded[-1].std):.6g} to {np.max(outcome.std):.6g}; it must follow from earlier releases alone"
        )
    change, allowed = distance(outcome, recorded[-1], world.claim, len(updates)), float(device in updates)
    if not change <= allowed * (1 + SLACK) + SLACK * (1 - allowed):
        raise PrivacyTestFailure(
            f"record and replay: {story} ({world.crowd}) changes the release of round {now} by {change:.4g} C / n, "
            f"allowed is {allowed:.0f} given equal earlier releases"
        )
