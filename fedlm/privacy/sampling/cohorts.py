"""Who is in a round's cohort, by the samplers of `fedlm.privacy.sampling.cohort_samplers`, and the ledger of who has
been in one.

Cohorts are functions of (key, round) alone: a resumed run draws the same cohorts, in any order. The key is a secret of
the run (`fedlm.privacy.sampling.cohort_key`); an experiment's seed is none.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedlm.errors import BudgetExceededError
from fedlm.privacy.mechanisms.base import Participation
from fedlm.privacy.sampling.cohort_key import CohortKey
from fedlm.registry import COHORT_SAMPLERS

DeviceIds = npt.NDArray[np.int64]


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
    if not min_separation:
        kind = COHORT_SAMPLERS.resolve(sampler)
        separation = kind.separation(population=population, cohort=cohort, rounds=rounds, most_apart=most_apart)
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
    cohort: DeviceIds = COHORT_SAMPLERS.resolve(rule.sampler).draw(rule, key, round_number)
    return cohort


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
