"""Check 4: no noise twice. Rounds, runs of the same seed and restarts draw noise that nothing repeats.

Noise that comes back cancels in a difference of two releases, and what is left has no privacy at all.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fedlm.testkit import statistics
from fedlm.testkit.failure import PrivacyTestFailure
from fedlm.testkit.subject import Floats, Make, Outcome, Setting, Subject
from fedlm.testkit.worlds import ask, fleet_updates, known_mean, whitened

SETTING = Setting(
    size=4_096, fleet_size=24, cohort=8, clip_norm=0.5, noise_multiplier=1.0, rounds=4, seed=15, reproducible=False
)
_BEFORE = 2


def freshness(make: Make) -> None:
    """Compare all noise of three runs of one seed, one of them restarted, at all shifts.

    Arguments:
        make: Makes the runs under examination.

    Raises:
        PrivacyTestFailure: Two noise vectors are correlated; both are named.

    Guarantee:
        False alarms: below 1e-7 (45 tests at 1e-10).
        Found in 20 of 20 trials: a correlation of 0.15 between two rounds. Compared are rounds 1-4, the same rounds of
        another process with the same seed, data and state of the global generators, and rounds 3-4 again after a
        restart with other data.
    """
    found: dict[str, Floats] = {}
    first, second = make(SETTING), make(SETTING)
    with _same_globals():
        outcomes, means = _rounds(first, range(1, _BEFORE + 1), 0.1)
    third = first.restarted()
    with _same_globals(advance=_BEFORE):
        later = _rounds(first, range(_BEFORE + 1, SETTING.rounds + 1), 0.1)
    found |= _named(first, outcomes + later[0], means + later[1], "of the first run")
    with _same_globals():
        found |= _named(second, *_rounds(second, range(1, SETTING.rounds + 1), 0.1), "of a second run of this seed")
    with _same_globals(advance=_BEFORE):
        again = _rounds(third, range(_BEFORE + 1, SETTING.rounds + 1), 0.05)
    restarted = _named(third, outcomes + again[0], means + again[1], "after a restart")
    found |= dict(list(restarted.items())[_BEFORE:])
    _compare(found)


def _rounds(subject: Subject, rounds: range, norm: float) -> tuple[list[Outcome], list[Floats]]:
    outcomes, means = [], []
    for t in rounds:
        updates = fleet_updates(SETTING, subject.sample_cohort(t), t, norm)
        outcomes.append(ask(subject, t, updates, "an ordinary cohort"))
        means.append(known_mean(updates, SETTING, outcomes[-1]))
    return outcomes, means


def _named(subject: Subject, outcomes: list[Outcome], means: list[Floats], whose: str) -> dict[str, Floats]:
    noise = whitened(subject, outcomes, means)  # (T, P)
    return {f"round {t} {whose}": row for t, row in enumerate(noise, start=1)}


def _compare(found: dict[str, Floats]) -> None:
    names = list(found)
    for i, left in enumerate(names):
        for right in names[:i]:
            if not statistics.correlation(found[left], found[right]) >= statistics.ALPHA:
                strength = _strength(found[left], found[right])
                raise PrivacyTestFailure(
                    f"fresh noise: the noise of {right} comes back in {left} (correlation {strength:.3g}); draw it "
                    "anew from the operating system for each release"
                )


def _strength(left: Floats, right: Floats) -> float:
    scale = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(left @ right) / scale if scale else 0.0


@contextmanager
def _same_globals(advance: int = 0) -> Iterator[None]:
    """Put every global generator into one state, as a user's `seed_everything(1)` does; restore it afterwards.

    Noise from a global generator looks fresh within a process and is the same in the next one.
    """
    torch: Any = sys.modules.get("torch")
    before = random.getstate(), np.random.get_state(), torch.get_rng_state() if torch else None
    random.seed(1 + advance)
    np.random.seed(1 + advance)
    if torch:
        torch.manual_seed(1 + advance)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        if torch:
            torch.set_rng_state(before[2])
