"""Check 8: cohorts follow from the seed alone, and are sampled as the accountant assumes."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedlm.testkit import statistics
from fedlm.testkit.failure import PrivacyTestFailure
from fedlm.testkit.subject import ClaimedGuarantee, Floats, Make, Setting, Subject

SETTING = Setting(
    size=8, fleet_size=50, cohort=10, clip_norm=0.5, noise_multiplier=1.0, rounds=400, seed=18, reproducible=False
)


def cohorts(make: Make) -> None:
    """Draw the cohorts of 400 rounds, again in another process and order, and test the law that is claimed.

    Arguments:
        make: Makes the runs under examination.

    Raises:
        PrivacyTestFailure: Cohorts are not sorted distinct devices, or not reproducible; a device comes earlier or more
            often, or a cohort is larger, than claimed; or (where Poisson sampling is claimed, also in classes or cut
            at a cap) they are not independent coins of probability q.

    Guarantee:
        False alarms: below 1e-7 (54 tests at 1e-10; the seed's cohorts are deterministic, so an honest sampler that
        passes once passes always).
        Found in 20 of 20 trials each: cohorts of fixed size, round-robin, one device with 2 q. Certain: a device too
        early or too often, a cohort beyond its cap, a device of two classes.
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
    _turns(present, subject.claim)
    q, cap = subject.claim.sampling_probability, subject.claim.largest_cohort
    if q is None:
        return
    eligible = _eligible(present, subject.claim.separation)
    _counts(present, eligible, _truncated(q, cap) if cap else q)
    if not cap:
        _independent(present, eligible, q)


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


def _turns(present: Floats, claim: ClaimedGuarantee) -> None:
    """Check separation, number of participations and size of cohorts: what a ledger enforces, without statistics."""
    for device, rounds in enumerate(np.flatnonzero(row) + 1 for row in present.T):
        gap = int(np.diff(rounds).min(initial=len(present)))
        if gap < claim.separation:
            raise PrivacyTestFailure(
                f"cohorts: device {device} comes again after {gap} rounds, the claim is {claim.separation} or more"
            )
        if claim.max_participations and len(rounds) > claim.max_participations:
            raise PrivacyTestFailure(
                f"cohorts: device {device} is in {len(rounds)} cohorts, the claim is {claim.max_participations} at most"
            )
    largest = int(present.sum(axis=1).max())
    if claim.largest_cohort and largest > claim.largest_cohort:
        raise PrivacyTestFailure(f"cohorts: one has {largest} devices, the claim is {claim.largest_cohort} at most")


def _eligible(present: Floats, classes: int) -> npt.NDArray[np.bool_]:
    """Return in which rounds (T, N) each device can be sampled: those of its class, which its first round tells."""
    rounds = np.arange(len(present)) % classes  # (T,)
    return np.asarray(rounds[:, None] == rounds[present.argmax(axis=0)][None, :])


def _truncated(q: float, cap: int) -> float:
    """Return the probability of a device to be in a cohort of independent coins that is cut at `cap` at random."""
    fleet, keep = SETTING.fleet_size, 0.0
    for others in range(fleet):
        probability = math.comb(fleet - 1, others) * q**others * (1 - q) ** (fleet - 1 - others)
        keep += probability * min(1.0, cap / (others + 1))
    return q * keep


def _counts(present: Floats, eligible: npt.NDArray[np.bool_], q: float) -> None:
    for device, (count, rounds) in enumerate(zip(present.sum(axis=0), eligible.sum(axis=0), strict=True)):
        if (present[:, device] > eligible[:, device]).any():
            raise PrivacyTestFailure(f"cohorts: device {device} is in the cohorts of more than one class")
        if rounds and not statistics.binomial(int(count), int(rounds), q) >= statistics.ALPHA:
            raise PrivacyTestFailure(
                f"cohorts: device {device} is in {count:.0f} of {rounds} cohorts, Poisson sampling at q = {q:g} "
                f"expects {rounds * q:.0f}"
            )


def _independent(present: Floats, eligible: npt.NDArray[np.bool_], q: float) -> None:
    centred = np.where(eligible, (present - q) / math.sqrt(q * (1 - q)), 0.0)
    pairs = (eligible.sum(axis=1).astype(np.float64) ** 2 - eligible.sum(axis=1)).sum()
    # Each is a sum of uncorrelated terms of mean 0 and variance 1 for independent coins; normal to good approximation.
    figures = {
        "devices of one round are not independent (sizes vary too little or too much)": (
            (centred.sum(axis=1) ** 2 - (centred**2).sum(axis=1)).sum() / math.sqrt(2 * pairs)
        ),
    }
    if eligible.all():
        figures["consecutive rounds are not independent"] = (centred[1:] * centred[:-1]).sum() / math.sqrt(
            (len(present) - 1) * present.shape[1]
        )
    for what, deviations in figures.items():
        if statistics.two_sided(float(deviations)) < statistics.ALPHA:
            raise PrivacyTestFailure(f"cohorts: {what}, {deviations:.3g} standard deviations from Poisson sampling")
