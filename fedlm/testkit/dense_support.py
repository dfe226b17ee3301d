"""Check 5: noise on every coordinate, also where nobody contributed and when nobody came.

A coordinate that moves only when somebody touched it says, without any statistics, what was touched.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlm.testkit import statistics
from fedlm.testkit.failure import PrivacyTestFailure
from fedlm.testkit.subject import Floats, Make, Setting
from fedlm.testkit.worlds import ask, known_mean, whitened_rounds
from fedlm.trainable.spec import RowIds, Vector

SETTING = Setting(
    size=4_096, fleet_size=24, cohort=8, clip_norm=0.5, noise_multiplier=1.0, rounds=3, seed=16, reproducible=False
)
_SILENT = 1e-5
_ONE_LEFT = "everybody drops out but one, who sends zero"
_MOST_SILENT = 8


def dense_support(make: Make) -> None:
    """Look for coordinates without noise where few, none or broken devices contribute.

    Arguments:
        make: Makes the runs under examination.

    Raises:
        PrivacyTestFailure: A round has silent coordinates (noise below 1e-5 std); a coordinate is silent in all rounds;
            the noise is weaker on touched or untouched coordinates; or the release has another size.

    Guarantee:
        False alarms: below 1e-8 (eight silent ones of 4,096 at 8e-6 each; one silent three times; 10 tests at
        1e-10). Found for certain: noise that skips eight coordinates in a round, or one in all rounds.
        Found in 20 of 20 trials each: a std wrong by 10 % on half of the coordinates, by 15 % on an eighth that
        is touched.
    """
    for world, touched in _worlds().items():
        subject, outcomes, means = make(SETTING), [], []
        for t in range(1, SETTING.rounds + 1):
            updates = _updates(world, touched, subject.sample_cohort(t), t)
            outcomes.append(ask(subject, t, updates, world))
            means.append(known_mean(updates, SETTING, outcomes[-1]))
            if outcomes[-1].release.size < SETTING.size:
                raise PrivacyTestFailure(
                    f"dense support: round {t} ({world}) released {outcomes[-1].release.size:,} of {SETTING.size:,} "
                    "coordinates; which ones are missing must not follow the data"
                )
        _look(whitened_rounds(subject, outcomes, means), world, touched)


def _worlds() -> Mapping[str, slice]:
    """Return which coordinates each world touches."""
    size = SETTING.size
    return {
        "an empty cohort": slice(0, 0),
        _ONE_LEFT: slice(0, 0),
        "everybody sends NaN": slice(0, 0),
        "one coordinate is touched": slice(size // 2, size // 2 + 1),
        "an eighth of the coordinates is touched": slice(size // 2, size // 2 + size // 8),
    }


def _updates(world: str, touched: slice, cohort: RowIds, round_number: int) -> dict[int, Vector]:
    update = np.zeros(SETTING.size, np.float32)
    update[touched] = np.float32(0.1 * SETTING.clip_norm / max(1, touched.stop - touched.start) ** 0.5)
    if world == "an empty cohort" or (world == _ONE_LEFT and round_number == 2):
        return {}
    if world == _ONE_LEFT:
        return {int(device): update for device in cohort[:1]}
    if "NaN" in world:
        update[:] = np.nan
    return dict.fromkeys(map(int, cohort), update)


def _look(rounds: list[Floats], world: str, touched: slice) -> None:
    for t, row in enumerate(rounds, start=1):
        if (count := int(np.sum(np.abs(row) < _SILENT))) >= _MOST_SILENT:
            raise PrivacyTestFailure(
                f"dense support: {count:,} of {SETTING.size:,} coordinates have no noise in round {t} ({world}); "
                "noise has to be added everywhere, whatever the data"
            )
    size = min(map(len, rounds))
    noise = np.array([row[:size] for row in rounds])  # (T, P)
    if count := int((np.abs(noise) < _SILENT).all(axis=0).sum()):
        raise PrivacyTestFailure(f"dense support: {count:,} coordinates never have noise ({world})")
    is_touched = np.zeros(noise.shape[1], bool)
    is_touched[touched] = True
    for what, part in (("touched", noise[:, is_touched]), ("untouched", noise[:, ~is_touched])):
        if part.size and not statistics.variance(part.ravel()) >= statistics.ALPHA:
            raise PrivacyTestFailure(
                f"dense support: {what} coordinates have {float(np.std(part)):.4g} times the claimed noise ({world}); "
                "it tells them apart"
            )
