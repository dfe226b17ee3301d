"""Mistakes of what is kept or published beside the release, of side queries and of correlated noise."""

from __future__ import annotations

from typing import Any

import numpy as np
from kit_plain import Adaptive, Correlated, Floats, Plain, Updates
from kit_registry import mutant


@mutant("momentum of the raw sum", "post-processing")
class _RawMomentum(Plain):
    def adapt(self, t: int, updates: Updates, release: Floats) -> None:
        self.momentum = self.momentum + self.total(t, updates) / self.setting.cohort


@mutant("early stopping on raw norms", "post-processing")
class _EarlyStop(Plain):
    def state(self, t: int, updates: Updates) -> dict[str, Any]:
        small = sum(np.linalg.norm(self.clip(u)) for u in updates.values()) < 0.05 * self.setting.cohort
        return super().state(t, updates) | {"stopped": np.array(small)}


@mutant("learning rate from the number that reported", "post-processing")
class _RealisedRate(Plain):
    def adapt(self, t: int, updates: Updates, release: Floats) -> None:
        self.values = self.values * (1 - 1e-3 * len(updates))


@mutant("a metric of raw norms", "post-processing")
class _Metric(Plain):
    def state(self, t: int, updates: Updates) -> dict[str, Any]:
        norms = [float(np.linalg.norm(u)) for u in updates.values()]
        return super().state(t, updates) | {"mean norm": np.array(np.mean(norms) if norms else 0.0)}


@mutant("clip bit without noise", "dense support")
class _SilentBit(Adaptive):
    def actual_std(self, noise: Floats, clean: Floats) -> Floats:
        return self.stated_std() * (np.arange(len(clean)) < self.setting.size)


@mutant("clip bit with half its noise", "noise law")
class _WeakBit(Adaptive):
    def actual_std(self, noise: Floats, clean: Floats) -> Floats:
        return self.stated_std() * np.where(np.arange(len(clean)) < self.setting.size, 1, 0.5)


@mutant("clip bit not paid from the update's noise", "clip bound")
class _UnpaidBit(Adaptive):
    share = 1.0


@mutant("correlated noise by C instead of its inverse", "noise law")
class _NotInverted(Correlated):
    def mixed(self, t: int) -> Floats:
        return self.matrix[t - 1, :t] @ np.array(self.draws)


@mutant("correlated noise that uses a draw again", "fresh noise")
class _ReusedDraw(Correlated):
    def mixed(self, t: int) -> Floats:
        if t % 2 == 0:
            self.draws[-1] = self.draws[-2]
        return super().mixed(t)


@mutant("correlated noise whose buffers a restart forgets", "fresh noise")
class _Forgets(Correlated):
    def restarted(self) -> Plain:
        other = super().restarted()
        other.draws = [np.zeros(self.setting.size) for _ in self.draws]
        return other


@mutant("a side query that takes twice its share", "clip bound")
class _Greedy(Adaptive):
    def bits(self, updates: Updates) -> float:
        return 2 * super().bits(updates)


@mutant("clip bits divided by the realised cohort", "clip bound")
class _RealisedBits(Adaptive):
    def bits(self, updates: Updates) -> float:
        return super().bits(updates) * self.setting.cohort / max(1, len(updates))


@mutant("an adaptive clip whose noise stays at the first clip norm", "noise law")
class _FirstClip(Adaptive):
    def actual_std(self, noise: Floats, clean: Floats) -> Floats:
        std = self.stated_std()
        std[:-1] *= self.setting.clip_norm / self.clip_norm
        return std
