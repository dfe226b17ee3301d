"""Mistakes of the clip, of the sum and of its divisor."""

from __future__ import annotations

from typing import Any

import numpy as np
from kit_plain import Floats, Plain, Scaled, Updates
from kit_registry import mutant

from fedlm.testkit import Outcome


@mutant("sampled cohort as divisor", "record and replay")
class _Sampled(Plain):
    def divisor(self, t: int, updates: Updates) -> float:
        return max(1, len(self.sample_cohort(t)))


@mutant("stragglers taken out of the divisor", "clip bound")
class _Stragglers(Plain):
    def divisor(self, t: int, updates: Updates) -> float:
        return self.setting.cohort * max(1, len(updates)) / max(1, len(self.sample_cohort(t)))


@mutant("clip by the largest coordinate", "clip bound")
class _LInfinity(Plain):
    def clip(self, update: Any) -> Floats:
        return np.clip(np.nan_to_num(update.astype(np.float64)), -self.clip_norm, self.clip_norm)


@mutant("norm in fp16, which overflows", "clip bound")
class _HalfNorm(Plain):
    def clip(self, update: Any) -> Floats:
        norm = float(np.sqrt(np.sum(update.astype(np.float16) ** 2)))
        if not np.isfinite(update).all():
            return np.zeros(len(update))
        return update.astype(np.float64) * (min(1.0, self.clip_norm / max(norm, 1e-8)) if np.isfinite(norm) else 1.0)


@mutant("root mean square for the norm", "clip bound")
class _MeanSquare(Plain):
    def clip(self, update: Any) -> Floats:
        return super().clip(update / np.float32(np.sqrt(len(update)))) * np.sqrt(len(update))


@mutant("clip only beyond twice the bound", "clip bound")
class _Late(Plain):
    def clip(self, update: Any) -> Floats:
        wide = update.astype(np.float64)
        return wide if np.linalg.norm(wide) <= 2 * self.clip_norm else super().clip(update)


@mutant("clip of the running sum", "clip bound")
class _Running(Plain):
    def total(self, t: int, updates: Updates) -> Floats:
        total = np.zeros(self.setting.size)
        for update in updates.values():
            total = self.clip(total + update) if np.isfinite(update).all() else total
        return total


@mutant("a device counted twice", "clip bound")
class _Twice(Plain):
    def total(self, t: int, updates: Updates) -> Floats:
        return sum((self.clip(updates[d]) for d in [*updates, *list(updates)[-1:]]), np.zeros(self.setting.size))


@mutant("sum in bfloat16", "clip bound")
class _BrainSum(Plain):
    def total(self, t: int, updates: Updates) -> Floats:
        total = np.zeros(self.setting.size, np.float32)
        for update in updates.values():
            bits = (total + self.clip(update).astype(np.float32)).view(np.uint32) & np.uint32(0xFFFF0000)
            total = bits.view(np.float32)
        return total.astype(np.float64)


@mutant("last round's straggler added to this round", "record and replay")
class _Stale(Plain):
    def start(self) -> None:
        self.late = np.zeros(self.setting.size)

    def step(self, t: int, updates: Updates, release: Floats) -> Outcome:
        last = list(updates.values())[-1:]
        self.late = sum((0.5 * self.clip(update) for update in last), np.zeros(self.setting.size))
        return super().step(t, updates, release)

    def total(self, t: int, updates: Updates) -> Floats:
        return 0.5 * super().total(t, updates) + self.late


@mutant("round aborted when a device sends NaN", "clip bound")
class _Aborts(Plain):
    def clip(self, update: Any) -> Floats:
        if not np.isfinite(update).all():
            raise ValueError("the update is not finite")
        return super().clip(update)


@mutant("round skipped when few report", "clip bound")
class _Quorum(Plain):
    def total(self, t: int, updates: Updates) -> Floats:
        if len(updates) < self.setting.cohort // 2:
            raise RuntimeError("too few devices reported")
        return super().total(t, updates)


@mutant("pre-conditioner applied after the clip", "clip bound")
class _ScaledLate(Scaled):
    def clip(self, update: Any) -> Floats:
        return Plain.clip(self, update)


@mutant("scales computed from raw updates", "post-processing")
class _RawScales(Scaled):
    def adapt(self, t: int, updates: Updates, release: Floats) -> None:
        halves = np.split(self.total(t, updates), 2)
        self.scales = np.repeat([1 + float(np.linalg.norm(half)) for half in halves], self.setting.size // 2)


@mutant("group limits whose squares sum to more than one", "clip bound")
class _LooseGroups(Scaled):
    def clip(self, update: Any) -> Floats:
        halves = np.split(update / self.scales, 2)
        return np.concatenate([0.9 * Plain.clip(self, half / 0.9) for half in halves]) * self.scales


@mutant("unequal noise after one clip, accounted at its mean", "clip bound")
class _Published(Plain):
    def factors(self) -> Floats:
        return np.sqrt(np.where(np.arange(self.setting.size) < self.setting.size // 2, 0.25, 1.75))

    def stated_std(self) -> Floats:
        return super().stated_std() * self.factors()

    def noise(self, t: int, updates: Updates) -> Floats:
        return super().noise(t, updates) * self.factors()
