"""Who is in a round's cohort: each sampler a few lines, so that what is drawn can be held against what is accounted.

    poisson            every device flips its own coin with probability q = n / N
    truncated_poisson  the same, then at most `cap` of them, chosen uniformly
    fixed              n of N, without replacement: accounted without amplification
    cyclic_poisson     devices are split into b classes once; round t flips coins in class t mod b with q = b n / N
    separated          devices are put into N / n slots once; round t takes slot t modulo their number, so that a device
                       is in every b-th round at most, and nobody needs to know when

All are functions of (key, round) alone: a resumed run draws the same cohorts, in any order. The key is a secret of the
run (`fedlm.privacy.cohort_key`); an experiment's seed is none.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedlm.errors import BudgetExceededError, ConfigError
from fedlm.privacy.cohort_key import CohortKey
from fedlm.privacy.mechanisms.base import Participation

DeviceIds = npt.NDArray[np.int64]
SAMPLERS = ("poisson", "truncated_poisson", "fixed", "cyclic_poisson", "separated")


def participation_rule(
    sampler: str,
    *,
    population: int,
    cohort: int,
    rounds: int,
    cap: int = 0,
    min_separation: int = 0,
    max_participations: int = 0,
    most_apart: int = 0,
) -> Participation:
    """Return a rule with what was left out filled in.

    Arguments:
        sampler, population, cohort, rounds: As for `Participation`.
        cap: Of "truncated_poisson".
        min_separation: 0: as far apart as devices of a separated fleet can be.
        max_participations: 0: rounds / separation.
        most_apart: A limit to that, of a smaller fleet that follows the same rule; 0: none.
    """
    separation = min_separation or 1
    if sampler == "separated" and not min_separation:
        separation = max(1, min(population // cohort, most_apart or rounds, rounds))
    return Participation(
        sampler=sampler,
        population=population,
        cohort=cohort,
        rounds=rounds,
        cap=cap,
        separation=separation,
        max_participations=max_participations or -(-rounds // separation),
    )


def sample_cohort(rule: Participation, *, key: CohortKey, round_number: int) -> DeviceIds:
    """Return the sorted ids of the devices in a round's cohort.

    Arguments:
        rule: Of the fleet that is sampled: `population` is the number of its devices.
        key: The run's secret.
        round_number: t; rounds of a run count from 1.

    Returns:
        (realised cohort,) int64; possibly empty.
    """
    rng = key.stream("cohort", round_number)
    if rule.sampler == "fixed":
        return np.sort(rng.choice(rule.population, rule.cohort, replace=False)).astype(np.int64)
    if rule.sampler == "separated":
        return _slot(rule, key, (round_number - 1) % num_slots(rule))
    coins = rng.random(rule.population)  # (N,)
    joins = coins < rule.sampling_probability
    if rule.sampler == "cyclic_poisson":
        classes = key.stream("classes").integers(rule.separation, size=rule.population)  # (N,)
        joins &= classes == round_number % rule.separation
    cohort = np.flatnonzero(joins).astype(np.int64)
    if rule.sampler == "truncated_poisson" and len(cohort) > rule.cap:
        cohort = np.sort(rng.choice(cohort, rule.cap, replace=False))
    return cohort


def num_slots(rule: Participation) -> int:
    """Return how many slots the devices of a separated fleet are put into: rounds between two of a device's own.

    Raises:
        ConfigError: The fleet is too small for the separation.
    """
    slots = rule.population // rule.cohort
    if slots < rule.separation:
        raise ConfigError(
            f"fleet.cohort = {rule.cohort:,} of {rule.population:,} devices come again after {slots:,} rounds, but the "
            f"noise needs {rule.separation:,}; lower fleet.cohort or privacy.min_separation"
        )
    return slots


def check_turns(rule: Participation) -> None:
    """Refuse, before the first round, a fleet whose devices would come too early or too often.

    Raises:
        ConfigError: Too few devices for the separation or for the most participations.
    """
    if rule.sampler != "separated":
        return
    times = -(-rule.rounds // num_slots(rule))
    if times > (rule.max_participations or rule.rounds):
        raise ConfigError(
            f"fleet.cohort = {rule.cohort:,} of {rule.population:,} devices come up to {times:,} times in "
            f"{rule.rounds:,} rounds, privacy.max_participations = {rule.max_participations:,}; lower fleet.cohort or "
            "rounds"
        )


def _slot(rule: Participation, key: CohortKey, slot: int) -> DeviceIds:
    """Return the devices of one slot, of equal sizes but for the rounding."""
    edges = np.linspace(0, rule.population, num_slots(rule) + 1).astype(np.int64)
    order = key.stream("slots").permutation(rule.population)
    return np.sort(order[edges[slot] : edges[slot + 1]]).astype(np.int64)


class ParticipationLedger:
    """Every device's rounds: refuses a cohort that would break the mechanism's assumption, and tells what was realised.

    A device counts as taking part when it is sampled, whether or not its update arrives: that is what a restart can
    reproduce, and it errs on the safe side.

    Arguments:
        rule: What is promised: least separation and most participations.
    """

    def __init__(self, rule: Participation) -> None:
        self._rule = rule
        self._last = np.full(rule.population, -1, np.int32)  # (N,) last round, -1: none
        self._counts = np.zeros(rule.population, np.int32)  # (N,)
        self._least = 0

    @property
    def separation(self) -> int:
        """The least distance in rounds between two participations of any device; T if nobody came twice."""
        return self._least or self._rule.rounds

    @property
    def max_participations(self) -> int:
        """The most rounds that any device was in; at least 1, so that it can be accounted."""
        return max(1, int(self._counts.max(initial=0)))

    def participations(self, devices: DeviceIds) -> npt.NDArray[np.int32]:
        """Return how many rounds each of some devices (U,) was in."""
        return self._counts[devices]

    def eligible(self, round_number: int, devices: DeviceIds) -> npt.NDArray[np.bool_]:
        """Return which of some devices (U,) may be in a round, the rounds before it being recorded."""
        last = self._last[devices]
        rested = (last < 0) | (round_number - last >= self._rule.separation)
        return np.asarray(rested & (self._counts[devices] < (self._rule.max_participations or self._rule.rounds)))

    def record(self, round_number: int, cohort: DeviceIds) -> None:
        """Record a round's cohort, before any of it is asked for anything.

        Raises:
            BudgetExceededError: A device would come too early or too often; nothing was recorded.
        """
        barred = cohort[~self.eligible(round_number, cohort)]
        if len(barred):
            device, rule = int(barred[0]), self._rule
            raise BudgetExceededError(
                f"round {round_number}: device {device} was in round {self._last[device]}, in {self._counts[device]} "
                f"rounds so far; the noise allows {rule.max_participations} rounds, {rule.separation} apart"
            )
        before = self._last[cohort]
        if (before >= 0).any():
            gap = int((round_number - before[before >= 0]).min())
            self._least = min(self._least or gap, gap)
        self._last[cohort] = round_number
        self._counts[cohort] += 1
