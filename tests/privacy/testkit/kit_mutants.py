"""Wrong implementations, each by one mistake that somebody could make, and the check that must catch it.

`python tests/privacy/testkit/kit_mutants.py` prints the table of docs/testkit.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from kit_plain import Adaptive, Correlated, Floats, Plain, Updates

from fedlm.privacy.testkit import Make, Outcome, StrategyRun, StrategySubject
from fedlm.randomness import seed_key, stream
from fedlm.strategy import Release, StrategyState, SumStrategy

MUTANTS: dict[str, tuple[Make, str]] = {}
LISTED = 12
"""The first ones: PRIVACY.md's eleven, noise off by n in both directions."""


def mutant(name: str, caught_by: str) -> Callable[[type[Plain]], type[Plain]]:
    def note(kind: type[Plain]) -> type[Plain]:
        MUTANTS[name] = (kind, caught_by)
        return kind

    return note


def strategy_mutant(name: str, caught_by: str) -> Callable[[type[SumStrategy]], type[SumStrategy]]:
    def note(kind: type[SumStrategy]) -> type[SumStrategy]:
        MUTANTS[name] = (StrategySubject(kind), caught_by)
        return kind

    return note


def run_mutant(name: str, caught_by: str) -> Callable[[type[StrategyRun]], type[StrategyRun]]:
    def note(kind: type[StrategyRun]) -> type[StrategyRun]:
        MUTANTS[name] = (StrategySubject(Averaging, run=kind), caught_by)
        return kind

    return note


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


class Averaging(SumStrategy):
    """Correct: what the mutants of strategies and of the adapter start from."""

    slot_names = ("momentum",)

    def step(self, state: StrategyState, values: Any, mean: Any) -> tuple[Any, dict[str, float]]:
        state.slots["momentum"] += mean
        return values + state.slots["momentum"], {"norm": float(np.linalg.norm(mean))}


@strategy_mutant("a strategy that doubles a sum through its view", "clip bound")
class _Writes(Averaging):
    def accumulate(self, state: StrategyState, contribution: Any) -> StrategyState:
        view, _ = contribution.to_arrays()
        view.flags.writeable = True
        view *= 2
        return super().accumulate(state, contribution)


@strategy_mutant("a strategy that keeps the raw sum", "post-processing")
class _Keeps(Averaging):
    def finish(self, state: StrategyState, release: Release) -> tuple[StrategyState, dict[str, float]]:
        vector, _ = state.total.to_arrays()
        raw = float(np.sum(vector.astype(np.float64)))
        state, diagnostics = super().finish(state, release)
        return state, diagnostics | {"raw": raw}


@strategy_mutant("a strategy that counts its contributions", "post-processing")
class _Counts(Averaging):
    seen = 0

    def accumulate(self, state: StrategyState, contribution: Any) -> StrategyState:
        self.seen += contribution.num_devices
        return super().accumulate(state, contribution)

    def step(self, state: StrategyState, values: Any, mean: Any) -> tuple[Any, dict[str, float]]:
        values, diagnostics = super().step(state, values, mean)
        return values * np.float32(1 - 1e-3 * self.seen), diagnostics


@strategy_mutant("a strategy that skips empty rounds", "clip bound")
class _Skips(Averaging):
    def finish(self, state: StrategyState, release: Release) -> tuple[StrategyState, dict[str, float]]:
        if not state.total.num_devices:
            return replace(state, total=None, num_steps=state.num_steps + 1), {}
        return super().finish(state, release)


@run_mutant("the plan's release, scaled to the realised cohort", "record and replay")
class _Rescaled(StrategyRun):
    def _release(self, total: Any, round_number: int) -> Any:
        sampled = max(1, len(self.sample_cohort(round_number)))
        released = super()._release(total, round_number)
        return replace(released, mean=released.mean * np.float32(self._setting.cohort / sampled))


@run_mutant("the plan's release, smoothed over neighbouring coordinates", "noise law")
class _Smoothed(StrategyRun):
    def _release(self, total: Any, round_number: int) -> Any:
        released = super()._release(total, round_number)
        return replace(released, mean=(released.mean + np.roll(released.mean, 1)) / np.float32(np.sqrt(2)))


@run_mutant("the plan's release in half precision", "noise law")
class _HalfRelease(StrategyRun):
    def _release(self, total: Any, round_number: int) -> Any:
        released = super()._release(total, round_number)
        return replace(released, mean=released.mean.astype(np.float16).astype(np.float32))


@run_mutant("the mean of two releases of one sum", "noise law")
class _TwoReleases(StrategyRun):
    def _release(self, total: Any, round_number: int) -> Any:
        vector, _ = total.to_arrays()
        other = type(self)(*self._arguments)
        again = total.clipper.new_sum(total.size)
        again._live()[:] = vector
        one, two = super()._release(total, round_number), other._plan.release(again, round_number)
        return replace(one, mean=(one.mean + two.mean) / 2)


def table() -> str:
    """Return the Markdown table of all mutants."""
    rows = [f"| {i} | {name} | {check} |" for i, (name, (_, check)) in enumerate(MUTANTS.items(), start=1)]
    return "\n".join(["| | mutant | caught by |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
