"""Check 8: cohorts follow from the seed alone, and are sampled as the accountant assumes."""

from __future__ import annotations

import math

import numpy as np

from fedlm.privacy.testkit import statistics
from fedlm.privacy.testkit.failure import PrivacyTestFailure
from fedlm.privacy.testkit.subject import Floats, Make, Setting, Subject

SETTING = Setting(
    size=8, fleet_size=50, cohort=10, clip_norm=0.5, noise_multiplier=1.0, rounds=400, seed=18, reproducible=False
)


def cohorts(make: Make) -> None:
    """Draw the cohorts of 400 rounds, again in another process and order, and test the law that is claimed.

    Arguments:
        make: Makes the runs under examination.

    Raises:
        PrivacyTestFailure: Cohorts are not sorted distinct devices, are not reproducible, or (where Poisson sampling is
            claimed) are not independent coins of probability q.

    Guarantee:
        False alarms: below 1e-7 (54 tests at 1e-10; the seed's cohorts are deterministic, so an honest sampler that
        passes once passes always). Power over 99 %: cohorts of fixed size, round-robin, one device with 2 q.
    """
    subject, rounds = make(SETTING), range(1, SETTING.rounds + 1)
    present = np.array([_present(subject, t) for t in rounds])  # (T, N)
    again = make(SETTING)
    backwards = np.array([_present(again, t) for t in reversed(rounds)])[::-1]
    if (changed := int((present != backwards).any(axis=1).sum())) > 0:
        raise PrivacyTestFailure(
            f"cohorts: {changed:,} of {len(rounds):,} rounds have another cohort when they are asked for again; a "
            "cohort must be a function of seed and round"
        )
    q = subject.claim.sampling_probability
    if q is not None:
        _poisson(present, q)


def _present(subject: Subject, round_number: int) -> Floats:
    """Return 1 for each device of the cohort, (N,)."""
    devices = subject.sample_cohort(round_number)
    if len(devices) and not (devices[0] >= 0 and devices[-1] < SETTING.fleet_size and (np.diff(devices) > 0).all()):
        raise PrivacyTestFailure(
            f"cohorts: that of round {round_number} is not a sorted list of distinct devices below {SETTING.fleet_size}"
        )
    row = np.zeros(SETTING.fleet_size)
    row[devices] = 1
    return row


def _poisson(present: Floats, q: float) -> None:
    rounds, fleet = present.shape
    for device, count in enumerate(present.sum(axis=0)):
        if not statistics.binomial(int(count), rounds, q) >= statistics.ALPHA:
            raise PrivacyTestFailure(
                f"cohorts: device {device} is in {count:.0f} of {rounds} cohorts, Poisson sampling at q = {q:g} "
                f"expects {rounds * q:.0f}"
            )
    cells = rounds * fleet
    centred = (present - q) / math.sqrt(q * (1 - q))
    # Each is a sum of uncorrelated terms of mean 0 and variance 1 for independent coins; normal to good approximation.
    figures = {
        "devices of one round are not independent (sizes vary too little or too much)": (
            (centred.sum(axis=1) ** 2 - (centred**2).sum(axis=1)).sum() / math.sqrt(2 * cells * (fleet - 1))
        ),
        "consecutive rounds are not independent": (centred[1:] * centred[:-1]).sum() / math.sqrt((rounds - 1) * fleet),
    }
    for what, deviations in figures.items():
        if statistics.two_sided(float(deviations)) < statistics.ALPHA:
            raise PrivacyTestFailure(f"cohorts: {what}, {deviations:.3g} standard deviations from Poisson sampling")
