"""A correct DP-FedAvg in numpy, cut into small methods: what the mutants change one of."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlm.randomness import seed_key, stream
from fedlm.testkit import ClaimedGuarantee, Outcome, Setting
from fedlm.trainable.spec import Vector

Floats = npt.NDArray[np.float64]
Updates = Mapping[int, Vector]


class Plain:
    """Poisson cohorts, flat clip, Gaussian noise, server momentum."""

    matrix: Floats | None = None

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.clip_norm = setting.clip_norm
        self.values, self.momentum = np.zeros(setting.size), np.zeros(setting.size)
        self.start()

    def start(self) -> None:
        """What a mutant needs more."""

    @property
    def claim(self) -> ClaimedGuarantee:
        s = self.setting
        return ClaimedGuarantee(s.noise_multiplier, s.cohort, s.cohort / s.fleet_size, self.matrix)

    def sample_cohort(self, t: int) -> npt.NDArray[np.int64]:
        coins = stream(seed_key(self.setting.seed), "cohort", t).random(self.setting.fleet_size)  # (N,)
        return np.flatnonzero(coins < self.setting.cohort / self.setting.fleet_size)

    def round(self, t: int, updates: Updates) -> Outcome:
        release = self.total(t, updates) / self.divisor(t, updates) + self.noise(t, updates)
        return self.step(t, updates, release)

    def replay(self, t: int, updates: Updates, release: Floats) -> Outcome:
        return self.step(t, updates, release)

    def restarted(self) -> Plain:
        other = type(self)(self.setting)
        other.values, other.momentum, other.clip_norm = self.values.copy(), self.momentum.copy(), self.clip_norm
        return other

    def clip(self, update: Vector) -> Floats:
        wide = update.astype(np.float64)
        norm = np.linalg.norm(wide)
        return wide * min(1.0, self.clip_norm / max(norm, 1e-300)) if np.isfinite(norm) else np.zeros(len(wide))

    def total(self, t: int, updates: Updates) -> Floats:
        return sum((self.clip(update) for update in updates.values()), np.zeros(self.setting.size))

    def divisor(self, t: int, updates: Updates) -> float:
        return self.setting.cohort

    def std(self, t: int, updates: Updates) -> float:
        return self.setting.noise_multiplier * self.clip_norm / self.setting.cohort

    def rng(self, t: int) -> np.random.Generator:
        if self.setting.reproducible:
            return stream(seed_key(self.setting.seed), "noise", t)
        return np.random.Generator(np.random.Philox(key=secrets.randbits(128)))

    def draw(self, t: int, updates: Updates) -> Floats:
        return self.rng(t).standard_normal(self.setting.size)

    def noise(self, t: int, updates: Updates) -> Floats:
        return self.std(t, updates) * self.draw(t, updates)

    def stated_std(self) -> Any:
        return self.setting.noise_multiplier * self.clip_norm / self.setting.cohort

    def step(self, t: int, updates: Updates, release: Floats) -> Outcome:
        std = self.stated_std()
        self.adapt(t, updates, release)
        self.momentum = 0.9 * self.momentum + release[: self.setting.size]
        self.values = self.values + self.momentum
        return Outcome(release, std, self.state(t, updates))

    def adapt(self, t: int, updates: Updates, release: Floats) -> None:
        """What changes before the next round."""

    def state(self, t: int, updates: Updates) -> dict[str, Any]:
        return {"values": self.values, "momentum": self.momentum, "clip norm": np.array(self.clip_norm)}


class Adaptive(Plain):
    """The clip norm follows the median of update norms, through a side query of half the clip norm's square."""

    share = np.sqrt(0.5)

    def bits(self, updates: Updates) -> float:
        """Return the sum over devices of 1/2 for a norm below the clip norm, -1/2 for a larger one; in [-n/2, n/2]."""
        norms = [float(np.linalg.norm(update.astype(np.float64))) for update in updates.values()]
        return sum(0.5 if norm <= self.clip_norm else -0.5 for norm in norms)

    def stated_std(self) -> Floats:
        one = self.setting.noise_multiplier / self.setting.cohort / self.share
        return np.append(np.full(self.setting.size, one * self.clip_norm), one / 2)

    def round(self, t: int, updates: Updates) -> Outcome:
        clean = np.append(self.total(t, updates), self.bits(updates)) / self.setting.cohort
        noise = self.rng(t).standard_normal(len(clean))
        return self.step(t, updates, clean + self.actual_std(noise, clean) * noise)

    def actual_std(self, noise: Floats, clean: Floats) -> Floats:
        return self.stated_std()

    def adapt(self, t: int, updates: Updates, release: Floats) -> None:
        self.clip_norm = self.moved(release[-1])

    def moved(self, excess: float) -> float:
        return self.clip_norm * float(np.exp(-0.2 * np.clip(excess, -0.5, 0.5)))


class Scaled(Plain):
    """Divides by public scales before the clip and multiplies the release by them."""

    def start(self) -> None:
        self.scales = np.where(np.arange(self.setting.size) < self.setting.size // 2, 0.5, 2.0)

    def clip(self, update: Any) -> Floats:
        return super().clip(update / self.scales) * self.scales

    def stated_std(self) -> Floats:
        return super().stated_std() * self.scales

    def noise(self, t: int, updates: Updates) -> Floats:
        return super().noise(t, updates) * self.scales

    def state(self, t: int, updates: Updates) -> dict[str, Any]:
        return super().state(t, updates) | {"scales": self.scales}


class Separated(Plain):
    """Devices come in turn, each in every (N / n)-th round."""

    @property
    def claim(self) -> ClaimedGuarantee:
        return replace(super().claim, sampling_probability=None, separation=self.turns)

    @property
    def turns(self) -> int:
        return self.setting.fleet_size // self.setting.cohort

    def sample_cohort(self, t: int) -> npt.NDArray[np.int64]:
        order = stream(seed_key(self.setting.seed), "slots").permutation(self.setting.fleet_size)
        return np.sort(order[t % self.turns :: self.turns])


class Correlated(Plain):
    """Noise C^-1 Z with C a Toeplitz matrix of one falling column."""

    def start(self) -> None:
        rounds = self.setting.rounds
        lags = np.subtract.outer(np.arange(rounds), np.arange(rounds))
        self.matrix = np.where(lags >= 0, 0.5 ** np.maximum(lags, 0) / (1 + np.maximum(lags, 0)), 0.0)
        self.matrix[0, 0] = 1.0
        self.weights = np.linalg.inv(self.matrix)
        self.draws: list[Floats] = []

    def restarted(self) -> Plain:
        other = super().restarted()
        other.draws = list(self.draws)
        return other

    def replay(self, t: int, updates: Updates, release: Floats) -> Outcome:
        self.draws.append(self.rng(t).standard_normal(self.setting.size))
        return super().replay(t, updates, release)

    def draw(self, t: int, updates: Updates) -> Floats:
        self.draws.append(super().draw(t, updates))
        return self.mixed(t)

    def mixed(self, t: int) -> Floats:
        return self.weights[t - 1, :t] @ np.array(self.draws)
