"""Samplers against the laws that are accounted; the ledger against a plain list of rounds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fedlm.errors import BudgetExceededError, ConfigError
from fedlm.privacy.mechanisms.base import Participation
from fedlm.privacy.sampling.cohort_key import CohortKey
from fedlm.privacy.sampling.cohort_samplers import Separated
from fedlm.privacy.sampling.cohorts import ParticipationLedger, sample_cohort
from fedlm.registry import COHORT_SAMPLERS

KEY = CohortKey.reproducible(3)


def rule(sampler: str, **changes: int) -> Participation:
    fields = {"population": 600, "cohort": 30, "rounds": 200, "separation": 1, "max_participations": 200} | changes
    return Participation(sampler, **fields)


def attendance(of: Participation) -> np.ndarray:
    """Return who is in which round (T, N)."""
    found = np.zeros((of.rounds, of.population), bool)
    for t in range(of.rounds):
        found[t, sample_cohort(of, key=KEY, round_number=t + 1)] = True
    return found


@pytest.mark.parametrize("sampler", COHORT_SAMPLERS.built_in)
def test_cohorts_are_sorted_and_functions_of_key_and_round(sampler: str) -> None:
    of = rule(sampler, cap=35, separation=5)
    forwards = [sample_cohort(of, key=KEY, round_number=t) for t in range(1, 12)]
    backwards = [sample_cohort(of, key=KEY, round_number=t) for t in range(11, 0, -1)][::-1]
    for one, two in zip(forwards, backwards, strict=True):
        assert np.array_equal(one, two)
        assert np.array_equal(one, np.unique(one))
        assert one.dtype == np.int64
    assert not np.array_equal(sample_cohort(of, key=CohortKey.reproducible(4), round_number=1), forwards[0])


def test_poisson_coins_are_independent() -> None:
    present = attendance(rule("poisson"))
    assert stats.binomtest(int(present.sum()), present.size, 0.05).pvalue > 1e-6
    sizes = present.sum(axis=1)
    assert stats.kstest(sizes + np.random.default_rng(0).random(200) - 0.5, "norm", (30, np.sqrt(28.5))).pvalue > 1e-4


def test_a_cap_cuts_uniformly_and_only_large_cohorts() -> None:
    plain, capped = (attendance(rule(s, cap=28)) for s in ("poisson", "truncated_poisson"))
    assert (capped <= plain).all()
    assert (capped.sum(axis=1) == np.minimum(plain.sum(axis=1), 28)).all()
    cut = (plain & ~capped).sum(axis=0)  # by device: nobody is favoured
    expected = (plain.sum(axis=1) - capped.sum(axis=1)).sum() / 600
    assert stats.chisquare(cut.reshape(20, 30).sum(axis=1), np.full(20, expected * 30)).pvalue > 1e-4


def test_fixed_cohorts_have_a_fixed_size() -> None:
    present = attendance(rule("fixed"))
    assert (present.sum(axis=1) == 30).all()


def test_cyclic_classes_come_in_turn() -> None:
    of = rule("cyclic_poisson", separation=4)
    present = attendance(of)
    phases = [set(np.flatnonzero(present[:, d]) % 4) for d in range(600)]
    assert max(map(len, phases)) == 1
    classes = np.array([min(p) for p in phases if p])
    assert stats.chisquare(np.bincount(classes)).pvalue > 1e-4
    assert stats.binomtest(int(present.sum()), 600 * 50, 0.2).pvalue > 1e-6  # q = b n / N


def test_turns_keep_their_distance_and_everyone_comes() -> None:
    present = attendance(rule("separated", separation=20, max_participations=10))
    gaps = [np.diff(np.flatnonzero(present[:, d])) for d in range(600)]
    assert {int(g) for gap in gaps for g in gap} == {20}
    assert (present.sum(axis=0) == 10).all()


def test_fleets_too_small_for_their_turns_are_refused_before_the_first_round() -> None:
    Separated.check_turns(rule("separated", separation=20, max_participations=10))
    with pytest.raises(ConfigError, match="min_separation"):
        Separated.check_turns(rule("separated", separation=21))
    with pytest.raises(ConfigError, match="max_participations"):
        Separated.check_turns(rule("separated", separation=20, max_participations=9))


def test_the_ledger_sees_what_a_list_would() -> None:
    rng = np.random.default_rng(5)
    ledger, rounds = ParticipationLedger(rule("poisson")), [[] for _ in range(600)]
    for t in range(1, 60):
        cohort = np.flatnonzero(rng.random(600) < 0.03)
        ledger.record(t, cohort)
        for device in cohort:
            rounds[device].append(t)
    assert ledger.max_participations == max(map(len, rounds))
    assert ledger.separation == min(int(np.diff(r).min()) for r in rounds if len(r) > 1)


def test_the_ledger_bars_whoever_comes_too_early_or_too_often() -> None:
    ledger = ParticipationLedger(rule("separated", separation=3, max_participations=2))
    assert ledger.separation == 200
    ledger.record(1, np.array([4, 7]))
    assert not ledger.eligible(3, np.array([4, 7])).any()
    with pytest.raises(BudgetExceededError, match="device 7 was in round 1"):
        ledger.record(3, np.array([5, 7]))
    assert ledger.eligible(3, np.array([5])).all()  # nothing of the refused cohort was recorded
    ledger.record(4, np.array([7]))
    assert ledger.separation == 3
    with pytest.raises(BudgetExceededError):
        ledger.record(100, np.array([7]))
