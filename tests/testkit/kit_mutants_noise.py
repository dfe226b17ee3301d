"""Mistakes of the noise: its size, law, independence, and where there is none."""

from __future__ import annotations

import hashlib

import numpy as np
from kit_plain import Floats, Plain, Updates
from kit_registry import mutant

from fedlm.testkit import Outcome


@mutant("noise from the size of the sampled cohort", "noise law")
class _SampledStd(Plain):
    def std(self, t: int, updates: Updates) -> float:
        return super().std(t, updates) * self.setting.cohort / max(1, len(self.sample_cohort(t)))


@mutant("noise from the number that reported", "noise law")
class _ReportedStd(Plain):
    def std(self, t: int, updates: Updates) -> float:
        return super().std(t, updates) * self.setting.cohort / max(1, len(updates))


@mutant("noise of the workers, cancelled by the server", "noise law")
class _Cancelled(Plain):
    def draw(self, t: int, updates: Updates) -> Floats:
        shares = [super(_Cancelled, self).draw(t, updates) for _ in range(2)]
        return shares[0] + shares[1] - sum(shares)


@mutant("noise weaker by a tenth where nobody looks for it", "noise law")
class _Weaker(Plain):
    def std(self, t: int, updates: Updates) -> float:
        return super().std(t, updates) * (1.0 if self.setting.reproducible else 0.9)


@mutant("noise weaker by a fifth in one block", "noise law")
class _WeakBlock(Plain):
    def noise(self, t: int, updates: Updates) -> Floats:
        return super().noise(t, updates) * np.where(np.arange(self.setting.size) < self.setting.size // 8, 0.8, 1.0)


@mutant("bfloat16 noise", "noise law")
class _Brain(Plain):
    def draw(self, t: int, updates: Updates) -> Floats:
        bits = super().draw(t, updates).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float64)


@mutant("noise rounded to 2^-12 standard deviations", "noise law")
class _Coarse(Plain):
    def draw(self, t: int, updates: Updates) -> Floats:
        return np.rint(super().draw(t, updates) * 2**12) / 2**12


@mutant("normals drawn in fp32", "noise law")
class _Single(Plain):
    def draw(self, t: int, updates: Updates) -> Floats:
        return self.rng(t).standard_normal(self.setting.size, np.float32).astype(np.float64)


@mutant("uniform noise of the same variance", "noise law")
class _Uniform(Plain):
    def draw(self, t: int, updates: Updates) -> Floats:
        return self.rng(t).uniform(-np.sqrt(3), np.sqrt(3), self.setting.size)


@mutant("noise truncated at three standard deviations", "noise law")
class _Truncated(Plain):
    def draw(self, t: int, updates: Updates) -> Floats:
        return np.clip(super().draw(t, updates), -3, 3)


@mutant("noise drawn again when its norm is large", "noise law")
class _Redrawn(Plain):
    def draw(self, t: int, updates: Updates) -> Floats:
        rng = self.rng(t)
        while np.linalg.norm(noise := rng.standard_normal(self.setting.size)) ** 2 > 1.2 * self.setting.size:
            pass
        return noise


@mutant("the same noise in both halves", "noise law")
class _Halves(Plain):
    def draw(self, t: int, updates: Updates) -> Floats:
        return np.tile(self.rng(t).standard_normal(self.setting.size // 2), 2)


@mutant("noise reused from block to block, mirrored", "noise law")
class _Mirrored(Plain):
    def draw(self, t: int, updates: Updates) -> Floats:
        half = self.rng(t).standard_normal(self.setting.size // 2)
        return np.concatenate([half, -half[::-1]])


@mutant("noise from numpy's global generator", "fresh noise")
class _Global(Plain):
    def draw(self, t: int, updates: Updates) -> Floats:
        if self.setting.reproducible:
            return super().draw(t, updates)
        return np.random.standard_normal(self.setting.size)


@mutant("noise from the round number", "fresh noise")
class _RoundNumber(Plain):
    def rng(self, t: int) -> np.random.Generator:
        return super().rng(t) if self.setting.reproducible else np.random.default_rng(t)


@mutant("noise from a hash of the data", "fresh noise")
class _Hashed(Plain):
    def draw(self, t: int, updates: Updates) -> Floats:
        if self.setting.reproducible:
            return super().draw(t, updates)
        digest = hashlib.sha256(b"".join(u.tobytes() for u in updates.values()) + bytes([t])).digest()
        return np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(self.setting.size)


@mutant("generator restored from the checkpoint", "fresh noise")
class _Checkpointed(Plain):
    def start(self) -> None:
        self.generator = super().rng(0)

    def rng(self, t: int) -> np.random.Generator:
        return super().rng(t) if self.setting.reproducible else self.generator

    def restarted(self) -> Plain:
        other = super().restarted()
        other.generator.bit_generator.state = self.generator.bit_generator.state
        return other


@mutant("every second round the same noise with the other sign", "fresh noise")
class _Antithetic(Plain):
    def draw(self, t: int, updates: Updates) -> Floats:
        self.last = -self.last if t % 2 == 0 and hasattr(self, "last") else super().draw(t, updates)
        return self.last


@mutant("no noise for an empty cohort", "dense support")
class _SilentEmpty(Plain):
    def noise(self, t: int, updates: Updates) -> Floats:
        return super().noise(t, updates) if updates else np.zeros(self.setting.size)


@mutant("no noise when an update is not finite", "dense support")
class _SilentNaN(Plain):
    def noise(self, t: int, updates: Updates) -> Floats:
        finite = all(np.isfinite(update).all() for update in updates.values())
        return super().noise(t, updates) * finite


@mutant("one coordinate without noise", "dense support")
class _Dead(Plain):
    def noise(self, t: int, updates: Updates) -> Floats:
        return super().noise(t, updates) * (np.arange(self.setting.size) != self.setting.size // 3)


@mutant("row set from raw data", "dense support")
class _RawRows(Plain):
    def round(self, t: int, updates: Updates) -> Outcome:
        release = self.total(t, updates) / self.divisor(t, updates) + self.noise(t, updates)
        touched = [u != 0 for u in updates.values()]
        return self.step(t, updates, release * np.any(touched, axis=0) if touched else 0 * release)


@mutant("noise a third as strong when somebody is clipped", "two worlds")
class _ClippedLess(Plain):
    def std(self, t: int, updates: Updates) -> float:
        clipped = any(np.linalg.norm(u.astype(np.float64)) > self.clip_norm for u in updates.values())
        return super().std(t, updates) * (1 / 3 if clipped and not self.setting.reproducible else 1.0)
