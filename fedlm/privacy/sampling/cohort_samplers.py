"""Samplers of cohorts, a few lines each, so that what is drawn can be held against what is accounted.

A sampler says who is in a round's cohort (`draw`), which rules it can keep, and what a mechanism may assume of it. One
of somebody's own that says `accounted_as = "fixed"` is accounted like cohorts that everybody knows: without
amplification, by how often a device can come.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedlm.errors import ConfigError
from fedlm.privacy.mechanisms.base import Participation
from fedlm.privacy.sampling.cohort_key import CohortKey

DeviceIds = npt.NDArray[np.int64]


class CohortSampler(ABC):
    """Who is in a round's cohort; a function of key and round alone, so that a resumed run draws the same cohorts."""

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    """Who is in a cohort, in words that need no glossary."""
    accounted_as: ClassVar[str]
    """The built-in sampler whose accounting holds for this one too."""
    flips_coins: ClassVar[bool] = False
    """Whether each device flips a coin of its own, so that secret cohorts amplify."""
    keeps_separation: ClassVar[bool] = False
    """Whether it keeps a least number of rounds between two of a device's own, so that participations are counted."""
    takes_cap: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def draw(cls, rule: Participation, key: CohortKey, round_number: int) -> DeviceIds:
        """Return the sorted ids (realised cohort,) of a round's cohort.

        Arguments:
            rule: Of the fleet that is sampled.
            key: Of all cohorts of the run; secret where sampling amplifies.
            round_number: t; rounds of a run count from 1.
        """

    @classmethod
    def num_classes(cls, rule: Participation) -> int:
        """Return how many classes of devices take turns."""
        return 1

    @classmethod
    def largest_cohort(cls, rule: Participation) -> int:
        """Return the most devices of a round; 0 where nothing limits them."""
        return 0

    @classmethod
    def separation(cls, *, population: int, cohort: int, rounds: int, most_apart: int) -> int:
        """Return the separation where none is asked for; `most_apart` is that of a smaller fleet, 0: none."""
        return 1

    @classmethod
    def check_turns(cls, rule: Participation) -> None:
        """Refuse, before the first round, a fleet whose devices would come too early or too often.

        Raises:
            ConfigError: Too few devices for the separation or for the most participations.
        """
        return

    @classmethod
    def clause(cls, rule: Participation, times: int) -> str:
        """Return the sampling in words, for the statement of the guarantee; a user is in at most `times` rounds."""
        share = f"{rule.cohort:,} / {rule.population:,}"
        return f"cohorts of {share} users without amplification, each in at most {times:,} rounds"


class Poisson(CohortSampler):
    """Every device flips its own coin with probability q = n / N."""

    name = accounted_as = "poisson"
    summary = "every device flips its own coin"
    flips_coins = True

    @classmethod
    def draw(cls, rule: Participation, key: CohortKey, round_number: int) -> DeviceIds:
        """Return those whose coin shows heads."""
        joins = key.stream("cohort", round_number).random(rule.population) < rule.sampling_probability  # (N,)
        return np.flatnonzero(joins).astype(np.int64)

    @classmethod
    def clause(cls, rule: Participation, times: int) -> str:
        """Return q."""
        return f"Poisson sampling at q = {rule.cohort:,} / {rule.population:,} = {rule.sampling_probability:.4g}"


class TruncatedPoisson(Poisson):
    """The same, then at most `cap` of them, chosen uniformly."""

    name = accounted_as = "truncated_poisson"
    summary = "every device flips its own coin, cohorts are cut at a cap"
    takes_cap = True

    @classmethod
    def draw(cls, rule: Participation, key: CohortKey, round_number: int) -> DeviceIds:
        """Return a cohort of at most `cap` devices."""
        rng = key.stream("cohort", round_number)
        joins = rng.random(rule.population) < rule.sampling_probability  # (N,)
        cohort = np.flatnonzero(joins).astype(np.int64)
        return cohort if len(cohort) <= rule.cap else np.sort(rng.choice(cohort, rule.cap, replace=False))

    @classmethod
    def largest_cohort(cls, rule: Participation) -> int:
        """Return the cap."""
        return rule.cap

    @classmethod
    def clause(cls, rule: Participation, times: int) -> str:
        """Return q and cap."""
        return f"{super().clause(rule, times)} cut at {rule.cap:,} devices"


class Fixed(CohortSampler):
    """n of N, without replacement: accounted without amplification."""

    name = accounted_as = "fixed"
    summary = "cohorts of a fixed size"

    @classmethod
    def draw(cls, rule: Participation, key: CohortKey, round_number: int) -> DeviceIds:
        """Return n devices."""
        rng = key.stream("cohort", round_number)
        return np.sort(rng.choice(rule.population, rule.cohort, replace=False)).astype(np.int64)

    @classmethod
    def largest_cohort(cls, rule: Participation) -> int:
        """Return n."""
        return rule.cohort


class CyclicPoisson(CohortSampler):
    """Devices are split into b classes once; round t flips coins in class t mod b with q = b n / N."""

    name = accounted_as = "cyclic_poisson"
    summary = "classes of devices take turns, in its turn every device flips its own coin"
    flips_coins = True
    keeps_separation = True

    @classmethod
    def draw(cls, rule: Participation, key: CohortKey, round_number: int) -> DeviceIds:
        """Return those of the round's class whose coin shows heads."""
        joins = key.stream("cohort", round_number).random(rule.population) < rule.sampling_probability  # (N,)
        classes = key.stream("classes").integers(rule.separation, size=rule.population)  # (N,)
        return np.flatnonzero(joins & (classes == round_number % rule.separation)).astype(np.int64)

    @classmethod
    def num_classes(cls, rule: Participation) -> int:
        """Return b."""
        return rule.separation

    @classmethod
    def clause(cls, rule: Participation, times: int) -> str:
        """Return q and the number of classes."""
        classes, share = rule.separation, f"{rule.cohort:,} / {rule.population:,}"
        q = f"{rule.sampling_probability:.4g}"
        return f"Poisson sampling at q = {classes} * {share} = {q} in one of {classes} classes in turn"


class Separated(CohortSampler):
    """Devices are put into N / n slots once; round t takes slot t modulo their number.

    So a device is in every b-th round at most, and nobody needs to know when.
    """

    name = accounted_as = "separated"
    summary = "a device rests for a least number of rounds"
    keeps_separation = True

    @classmethod
    def draw(cls, rule: Participation, key: CohortKey, round_number: int) -> DeviceIds:
        """Return the round's slot."""
        num_slots = cls.num_slots(rule)
        edges = np.linspace(0, rule.population, num_slots + 1).astype(np.int64)  # equal sizes but for the rounding
        order = key.stream("slots").permutation(rule.population)  # (N,)
        slot = (round_number - 1) % num_slots
        return np.sort(order[edges[slot] : edges[slot + 1]]).astype(np.int64)

    @classmethod
    def separation(cls, *, population: int, cohort: int, rounds: int, most_apart: int) -> int:
        """Return the largest that the fleet allows."""
        return max(1, min(population // cohort, most_apart or rounds, rounds))

    @classmethod
    def num_slots(cls, rule: Participation) -> int:
        """Return how many slots the devices are put into: rounds between two of a device's own.

        Raises:
            ConfigError: The fleet is too small for the separation.
        """
        slots = rule.population // rule.cohort
        if slots < rule.separation:
            raise ConfigError(
                f"fleet.cohort = {rule.cohort:,} of {rule.population:,} devices come again after {slots:,} rounds, but "
                f"the noise needs {rule.separation:,}; lower fleet.cohort or privacy.min_separation"
            )
        return slots

    @classmethod
    def check_turns(cls, rule: Participation) -> None:
        """Refuse too few devices for the separation or for the most participations."""
        times = -(-rule.rounds // cls.num_slots(rule))
        if times > (rule.max_participations or rule.rounds):
            raise ConfigError(
                f"fleet.cohort = {rule.cohort:,} of {rule.population:,} devices come up to {times:,} times in "
                f"{rule.rounds:,} rounds, privacy.max_participations = {rule.max_participations:,}; lower fleet.cohort "
                "or rounds"
            )

    @classmethod
    def clause(cls, rule: Participation, times: int) -> str:
        """Return separation and participations."""
        share = f"{rule.cohort:,} / {rule.population:,}"
        return f"cohorts of {share} users, each in at most {times:,} rounds at least {rule.separation:,} apart"
