"""PRIVACY.md's eleven mistakes, noise off by n in both directions."""

from __future__ import annotations

from typing import Any

import numpy as np
from kit_plain import Adaptive, Floats, Plain, Updates
from kit_registry import mutant

from fedlm.randomness import seed_key, stream


@mutant("weight after the clip", "clip bound")
class _Weighted(Plain):
    def total(self, t: int, updates: Updates) -> Floats:
        return sum(((1 + d % 2) * self.clip(u) for d, u in updates.items()), np.zeros(self.setting.size))


@mutant("realised cohort as divisor", "clip bound")
class _Realised(Plain):
    def divisor(self, t: int, updates: Updates) -> float:
        return max(1, len(updates))


@mutant("NaN passes", "clip bound")
class _PassesNaN(Plain):
    def clip(self, update: Any) -> Floats:
        wide = update.astype(np.float64)
        return wide / max(1.0, float(np.linalg.norm(wide)) / self.clip_norm)


@mutant("noise too small by n", "noise law")
class _OffByN(Plain):
    def std(self, t: int, updates: Updates) -> float:
        return super().std(t, updates) / self.setting.cohort


@mutant("noise too large by n", "noise law")
class _TimesN(Plain):
    def std(self, t: int, updates: Updates) -> float:
        return super().std(t, updates) * self.setting.cohort


@mutant("per-layer clip with flat noise", "clip bound")
class _PerLayer(Plain):
    def clip(self, update: Any) -> Floats:
        return np.concatenate([super(_PerLayer, self).clip(half) for half in np.split(update, 2)])


@mutant("reused seed", "fresh noise")
class _Reused(Plain):
    def rng(self, t: int) -> np.random.Generator:
        return stream(seed_key(self.setting.seed), "noise", t)


@mutant("half-precision noise (fp16)", "noise law")
class _Half(Plain):
    def draw(self, t: int, updates: Updates) -> Floats:
        return super().draw(t, updates).astype(np.float16).astype(np.float64)


@mutant("noise on touched rows only", "dense support")
class _Touched(Plain):
    def noise(self, t: int, updates: Updates) -> Floats:
        return super().noise(t, updates) * (self.total(t, updates) != 0)


@mutant("adaptive clip on raw data", "post-processing")
class _RawAdaptive(Adaptive):
    def adapt(self, t: int, updates: Updates, release: Floats) -> None:
        self.clip_norm = self.moved(self.bits(updates) / self.setting.cohort)


@mutant("next round's clip in this round's noise", "noise law")
class _NextClip(Adaptive):
    def actual_std(self, noise: Floats, clean: Floats) -> Floats:
        std = self.stated_std()
        return std * self.moved(clean[-1] + std[-1] * noise[-1]) / self.clip_norm


@mutant("Laplace for Gaussian", "noise law")
class _Laplace(Plain):
    def draw(self, t: int, updates: Updates) -> Floats:
        return self.rng(t).laplace(size=self.setting.size) / np.sqrt(2)
