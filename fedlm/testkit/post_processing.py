"""Check 7: what follows a release is a function of releases and public data.

Post-processing is free only if it sees nothing else. A run is recorded, then replayed with the same releases over other
devices: model, optimiser arrays, diagnostics, clip norm, rows and cohorts must have the same bits. The same is asked of
a run that is restarted from its checkpoint: what is remembered anywhere else is lost there, and nobody vouches for it.
"""

from __future__ import annotations

import numpy as np

from fedlm.testkit.failure import PrivacyTestFailure
from fedlm.testkit.subject import Make, Outcome, Setting, Subject
from fedlm.testkit.worlds import CROWDS, ask, ask_replay

SETTING = Setting(
    size=64, fleet_size=24, cohort=8, clip_norm=0.5, noise_multiplier=1.0, rounds=4, seed=13, reproducible=True
)


def post_processing(make: Make) -> None:
    """Replay recorded releases over other data and compare everything that is published or kept.

    Arguments:
        make: Makes the runs under examination.

    Raises:
        PrivacyTestFailure: Something depends on the raw data, or on what no checkpoint holds; it is named, with its
            round.

    Guarantee:
        No false alarms. Found is whatever differs between the recorded cohort and one that is absent, that agrees on
        a huge update, that drops out, or that sends NaN, in any of four rounds.
    """
    recorded = _record(make, SETTING)
    _resume(make(SETTING), SETTING, recorded)
    for crowd in CROWDS:
        _replay(make(SETTING), SETTING, crowd, recorded)


def _record(make: Make, setting: Setting) -> list[tuple[Outcome, bytes]]:
    subject, found = make(setting), []
    for t in range(1, setting.rounds + 1):
        cohort = subject.sample_cohort(t)
        outcome = ask(subject, t, CROWDS["an ordinary cohort"](setting, cohort, t), "recorded")
        found.append((outcome, cohort.tobytes()))
    return found


def _replay(subject: Subject, setting: Setting, crowd: str, recorded: list[tuple[Outcome, bytes]]) -> None:
    for t, (wanted, cohort) in enumerate(recorded, start=1):
        found_cohort = subject.sample_cohort(t)
        if found_cohort.tobytes() != cohort:
            raise PrivacyTestFailure(
                f"post-processing: the cohort of round {t} follows the data ({crowd}); it must follow from the seed"
            )
        found = ask_replay(subject, t, CROWDS[crowd](setting, found_cohort, t), wanted)
        # Noise by report follows the number of reports, which is public; whoever else follows it is found below.
        if not subject.claim.by_report and not np.array_equal(wanted.std, found.std):
            raise PrivacyTestFailure(
                f"post-processing: after equal releases, {crowd} changes the noise's std of round {t} from "
                f"{np.max(wanted.std):.6g} to {np.max(found.std):.6g}"
            )
        _same_state(wanted, found, f"round {t} ({crowd})", "it has seen raw data")


def _resume(subject: Subject, setting: Setting, recorded: list[tuple[Outcome, bytes]]) -> None:
    """Restart the run after each round and go on with the releases and devices of the recorded one."""
    for t, (wanted, _) in enumerate(recorded, start=1):
        cohort = subject.sample_cohort(t)
        found = ask_replay(subject, t, CROWDS["an ordinary cohort"](setting, cohort, t), wanted)
        _same_state(wanted, found, f"round {t} (restarted after each round)", "no checkpoint holds what it follows")
        subject = subject.restarted()


def _same_state(wanted: Outcome, found: Outcome, where: str, reason: str) -> None:
    for name in sorted(wanted.state.keys() | found.state.keys()):
        one, other = wanted.state.get(name), found.state.get(name)
        if one is None or other is None:
            raise PrivacyTestFailure(f"post-processing: whether {name!r} exists after {where} follows the raw data")
        if one.tobytes() != other.tobytes():
            changed = int(np.sum(one != other)) if one.shape == other.shape else max(one.size, other.size)
            raise PrivacyTestFailure(
                f"post-processing: {name!r} after {where} differs in {changed:,} of {one.size:,} numbers though all "
                f"releases are equal; {reason}"
            )
