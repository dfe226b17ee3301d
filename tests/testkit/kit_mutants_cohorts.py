"""Mistakes of the sampler and of the ledger."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from kit_plain import Plain, Separated
from kit_registry import mutant

from fedlm.randomness import seed_key, stream
from fedlm.testkit import ClaimedGuarantee


@mutant("cohorts of fixed size, claimed as Poisson", "cohorts")
class _FixedSize(Plain):
    def sample_cohort(self, t: int) -> Any:
        order = stream(seed_key(self.setting.seed), "cohort", t).permutation(self.setting.fleet_size)
        return np.sort(order[: self.setting.cohort])


@mutant("cohorts in turn, claimed as Poisson", "cohorts")
class _InTurn(Plain):
    def sample_cohort(self, t: int) -> Any:
        classes = self.setting.fleet_size // self.setting.cohort
        coins = stream(seed_key(self.setting.seed), "classes").integers(classes, size=self.setting.fleet_size)
        return np.flatnonzero(coins == t % classes)


@mutant("sampling at twice the claimed probability", "cohorts")
class _Doubled(Plain):
    def sample_cohort(self, t: int) -> Any:
        coins = stream(seed_key(self.setting.seed), "cohort", t).random(self.setting.fleet_size)
        return np.flatnonzero(coins < 2 * self.setting.cohort / self.setting.fleet_size)


@mutant("cohorts from the generator's state", "cohorts")
class _Unrepeatable(Plain):
    def start(self) -> None:
        self.coins = stream(seed_key(self.setting.seed), "cohorts")

    def sample_cohort(self, t: int) -> Any:
        return np.flatnonzero(
            self.coins.random(self.setting.fleet_size) < self.setting.cohort / self.setting.fleet_size
        )


@mutant("a ledger that lets a device in too early", "cohorts")
class _NoLedger(Separated):
    def sample_cohort(self, t: int) -> Any:
        cohort = super().sample_cohort(t)
        return np.union1d(cohort, super().sample_cohort(t - 1)[:1]) if t % 50 == 0 else cohort


@mutant("a cap on the cohort that is not kept", "cohorts")
class _NoCap(Plain):
    @property
    def claim(self) -> ClaimedGuarantee:
        return replace(super().claim, largest_cohort=12)


@mutant("cyclic sampling with classes drawn for every round", "cohorts")
class _LooseClasses(Plain):
    @property
    def claim(self) -> ClaimedGuarantee:
        return replace(super().claim, sampling_probability=0.4, separation=2)

    def sample_cohort(self, t: int) -> Any:
        rng = stream(seed_key(self.setting.seed), "classes", t)
        coins = rng.random(self.setting.fleet_size)
        return np.flatnonzero((coins < 0.4) & (rng.random(self.setting.fleet_size) < 0.5))
