"""What the devices of the kit compute: ordinary fleets, hostile updates, and how a round is asked for.

All of it is a function of fixed keys, so that a failure comes back when the check is run again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np

from fedlm.randomness import seed_key, stream
from fedlm.testkit.failure import PrivacyTestFailure
from fedlm.testkit.subject import ClaimedGuarantee, Floats, Outcome, Setting, Subject
from fedlm.trainable.spec import RowIds, Vector

_KEY = seed_key(0)
_LARGEST = float(np.finfo(np.float32).max)
SLACK = 1e-3
"""Relative excess over a bound that counts as rounding: fp32 releases and the lattice of the noise are below 1e-4."""


@lru_cache(maxsize=512)
def direction(size: int, *counters: int) -> Vector:
    """Return a dense unit vector (P,), read-only."""
    vector = stream(_KEY, "direction", *counters).standard_normal(size)
    unit = (vector / np.linalg.norm(vector)).astype(np.float32)
    unit.flags.writeable = False
    return unit


def device_update(setting: Setting, device: int, round_number: int, norm: float) -> Vector:
    """Return the ordinary update (P,) of a device, of norm `norm` C."""
    return direction(setting.size, device, round_number) * np.float32(norm * setting.clip_norm)


def fleet_updates(setting: Setting, cohort: RowIds, round_number: int, norm: float) -> dict[int, Vector]:
    """Return ordinary updates of a cohort."""
    return {int(d): device_update(setting, int(d), round_number, norm) for d in cohort}


Crowd = Callable[[Setting, RowIds, int], dict[int, Vector]]
"""What all devices but the examined one compute: (setting, cohort, round) -> updates."""


def _nobody(setting: Setting, cohort: RowIds, round_number: int) -> dict[int, Vector]:
    return {}


def _ordinary(setting: Setting, cohort: RowIds, round_number: int) -> dict[int, Vector]:
    return fleet_updates(setting, cohort, round_number, 0.1)


def _stragglers(setting: Setting, cohort: RowIds, round_number: int) -> dict[int, Vector]:
    return fleet_updates(setting, cohort[: max(1, len(cohort) // 4)], round_number, 0.1)


def _agreed(setting: Setting, cohort: RowIds, round_number: int) -> dict[int, Vector]:
    return {int(d): direction(setting.size, 0) * np.float32(50 * setting.clip_norm) for d in cohort}


def _broken(setting: Setting, cohort: RowIds, round_number: int) -> dict[int, Vector]:
    return {int(d): np.full(setting.size, np.nan, np.float32) for d in cohort}


CROWDS: Mapping[str, Crowd] = {
    "nobody else reports": _nobody,
    "an ordinary cohort": _ordinary,
    "most of the cohort drops out": _stragglers,
    "the others agree on a huge update": _agreed,
    "the others send NaN": _broken,
}
SMALL_CROWDS: Mapping[str, Crowd] = {
    name: crowd for name, crowd in CROWDS.items() if name != "the others agree on a huge update"
}
"""Crowds whose sum is known without knowing how the clip works: below the bound, or zero."""


def without(claim: ClaimedGuarantee, others: Mapping[int, Vector], device: int, size: int) -> dict[int, Vector]:
    """Return the neighbouring world: the device stays away or, where every report has its own noise, sends zero."""
    return dict(others) if not claim.by_report else joined(others, device, np.zeros(size, np.float32))


def joined(others: Mapping[int, Vector], device: int, update: Vector) -> dict[int, Vector]:
    """Return the updates of all devices, in the order of their ids."""
    return dict(sorted({**others, device: update}.items()))


def known_mean(updates: Mapping[int, Vector], setting: Setting, outcome: Outcome) -> Floats:
    """Return the release without its noise, for updates that are not finite or that no clip changes.

    Returns:
        (P,) their sum / n; zeros for the whole release (P',), side queries included, where nobody reported.
    """
    if not updates:
        return np.zeros(outcome.release.size)
    total = np.zeros(setting.size)
    for update in updates.values():
        total += np.where(np.isfinite(update).all(), update, 0)
    return total / setting.cohort


def probes(setting: Setting, round_number: int = 1) -> dict[str, Vector]:
    """Return hostile updates (P,) by name."""
    size, bound = setting.size, setting.clip_norm
    v, ones = direction(size, 1_000, round_number).astype(np.float64), np.ones(size)
    axis, signs = np.eye(1, size, size // 2)[0], np.where(np.arange(size) % 2, 1.0, -1.0)
    one_nan, nan_and_huge = v * bound / 2, v * 1e30
    one_nan[size // 3] = nan_and_huge[0] = math.nan
    with np.errstate(over="ignore"):
        found = {
            "a zero update": 0 * v,
            "a denormal update": 1e-42 * signs,
            "a tiny update": 1e-30 * v,
            "half the bound": v * bound / 2,
            "exactly the bound": v * bound,
            "slightly over the bound": v * bound * 1.01,
            "ten times the bound": v * bound * 10,
            "a norm that overflows fp16": v * 1e5,
            "a norm that overflows fp32": v * 1e30,
            "the largest floats": signs * _LARGEST,
            "a single huge coordinate": axis * bound * 1e3,
            "all coordinates at the bound": ones * bound,
            "a huge first half": v * bound * 1e3 * (np.arange(size) < size // 2),
            "a huge second half": v * bound * 1e3 * (np.arange(size) >= size // 2),
            "against the others": -direction(size, 0).astype(np.float64) * bound * 1e3,
            "one NaN": one_nan,
            "only NaN": ones * math.nan,
            "NaN beside huge values": nan_and_huge,
            "one infinity": np.where(axis > 0, math.inf, v * bound),
            "minus infinity": -ones * math.inf,
        }
        return {name: vector.astype(np.float32) for name, vector in found.items()}


def drawn_probes(setting: Setting, count: int) -> dict[str, Vector]:
    """Return updates of drawn scale (1e-45 to 1e38), sparsity and defects."""
    found: dict[str, Vector] = {}
    for i in range(count):
        rng = stream(_KEY, "probe", i)
        vector = rng.standard_normal(setting.size) * 10 ** rng.uniform(-45, 37)
        vector *= rng.random(setting.size) < 10 ** rng.uniform(-2, 0)
        if rng.random() < 0.2:
            vector[rng.integers(setting.size)] = rng.choice([math.nan, math.inf, -math.inf])
        found[f"drawn update {i}"] = vector.astype(np.float32)
    return found


def ask(subject: Subject, round_number: int, updates: Mapping[int, Vector], world: str) -> Outcome:
    """Run a round in which nothing may fail.

    Raises:
        PrivacyTestFailure: The round was aborted, or released something else than finite numbers.
    """
    return _guarded(lambda: subject.round(round_number, updates), round_number, world)


def ask_replay(subject: Subject, round_number: int, updates: Mapping[int, Vector], recorded: Outcome) -> Outcome:
    """Replay a round with the release of another run, in which nothing may fail; see `ask`."""
    release = np.array(recorded.release, np.float64)
    return _guarded(lambda: subject.replay(round_number, updates, release), round_number, "replayed")


def _guarded(run: Callable[[], Outcome], round_number: int, world: str) -> Outcome:
    try:
        with np.errstate(all="ignore"):
            outcome = run()
    except PrivacyTestFailure:
        raise
    except Exception as error:
        raise PrivacyTestFailure(
            f"no abort because of data: round {round_number} ({world}) stopped with {type(error).__name__}: {error}"
        ) from error
    if bad := int(np.sum(~np.isfinite(outcome.release))):
        raise PrivacyTestFailure(
            f"clip bound: round {round_number} ({world}) released {bad:,} coordinates that are not finite; a "
            "non-finite update must become zero"
        )
    if not (np.isfinite(outcome.std).all() and np.all(np.asarray(outcome.std) > 0)):
        raise PrivacyTestFailure(
            f"noise law: round {round_number} ({world}) claims a noise of std {np.min(outcome.std):g}; without noise "
            "nothing is private"
        )
    return outcome


def whitened(subject: Subject, outcomes: list[Outcome], means: list[Floats]) -> Floats:
    """Return Z (T, P): the noise of rounds 1..T in units of its claimed std, after the stated C; iid N(0, 1).

    Arguments:
        subject: For its claim.
        outcomes: Of rounds 1..T.
        means: (P,) what each release is without noise.
    """
    size = min(len(mean) for mean in means)
    return np.array(whitened_rounds(subject, outcomes, [mean[:size] for mean in means]))


def whitened_rounds(subject: Subject, outcomes: list[Outcome], means: list[Floats]) -> list[Floats]:
    """Return `whitened` round by round (P',), as far as each mean goes: side queries ask in some rounds and not in
    others.

    In worlds without contributions side queries answer zero, so that their noise is looked at too: give means of the
    whole release there. Correlated noise needs equal coordinates in all rounds.
    """
    rows = [
        (outcome.release[: len(mean)].astype(np.float64) - mean) / _head(outcome.std, len(mean))
        for outcome, mean in zip(outcomes, means, strict=True)
    ]
    matrix = subject.claim.matrix  # (T, T)
    if matrix is None:
        return rows
    size = min(map(len, rows))
    return list(matrix[: len(rows), : len(rows)] @ np.array([row[:size] for row in rows]))


def distance(left: Outcome, right: Outcome, claim: ClaimedGuarantee, num_reports: int) -> float:
    """Return how far two releases lie apart, in units of what one device may change: z |difference / std|.

    Noise by report hides two updates up to 2 C apart, so one beside zero may change half of it, in units of the noise
    of its own report.
    """
    difference = (left.release.astype(np.float64) - right.release.astype(np.float64)) / left.std
    unit = 2 * math.sqrt(max(num_reports, 1)) if claim.by_report else 1.0
    return claim.noise_multiplier * unit * float(np.linalg.norm(difference))


def _head(std: float | Floats, size: int) -> float | Floats:
    return std[:size] if isinstance(std, np.ndarray) else std
