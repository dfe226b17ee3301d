"""The key of the cohorts: a secret of the operating system unless declared otherwise, and what it costs if known."""

from __future__ import annotations

import copy
import json
import math
import pickle
from hashlib import blake2b
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedlm.config.schema import OptionValues, PrivacyConfig
from fedlm.errors import DataError
from fedlm.privacy import PrivacyPlan
from fedlm.privacy.guarantee import to_dict
from fedlm.privacy.mechanisms.base import Participation
from fedlm.privacy.mechanisms.toeplitz import square_root_column
from fedlm.privacy.sampling.cohort_key import CohortKey
from fedlm.privacy.sampling.cohorts import sample_cohort
from fedlm.registry import COHORT_SAMPLERS

DEBUG = {"reproducible_cohorts": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "poisson": {},
    "truncated_poisson": {"sampler": "truncated_poisson", "cap": 90},
    "fixed": {"sampler": "fixed"},
    "cyclic_poisson": {"mechanism": "banded", "options": OptionValues({"bands": 4})},
    "separated": {"mechanism": "blt"},
    "skellam": {"mechanism": "skellam"},
}
NEED_SECRET_COHORTS = ("poisson", "truncated_poisson", "cyclic_poisson", "skellam")
BITS = {  # of `sample_cohort` for seed 3, rounds 1 to 11, before cohorts had a key
    "poisson": "54af66371f75ff4b",
    "truncated_poisson": "73fa6a9adba44e66",
    "fixed": "723837d3b0ed36ae",
    "cyclic_poisson": "a46714eed1c96587",
    "separated": "11b9dd62dca9d755",
}


def make(name: str, **privacy: Any) -> PrivacyPlan:
    config = PrivacyConfig(**{"epsilon": 0.0, "noise_multiplier": 1.0, "clip_norm": 0.3, **SETTINGS[name], **privacy})
    return PrivacyPlan.create(config, rounds=20, fleet_size=1_000, cohort=50, seed=7, size=100)


def cohorts(plan: PrivacyPlan) -> list[list[int]]:
    return [plan.sample_cohort(t).tolist() for t in range(1, 21)]


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon of two Gaussians mu apart, from their trade-off (Balle and Wang 2018, theorem 8)."""

    def excess(epsilon: float) -> float:
        log_second = epsilon + norm.logcdf(-mu / 2 - epsilon / mu)
        return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(log_second) - delta)

    return float(brentq(excess, 1e-9, 2_000))


@pytest.mark.parametrize("name", SETTINGS)
def test_two_plans_of_one_seed_have_different_cohorts_and_none_is_the_seeds(name: str) -> None:
    one, other, guess = make(name), make(name), make(name, **DEBUG)
    assert cohorts(one) != cohorts(other)
    assert cohorts(guess) not in (cohorts(one), cohorts(other))
    for t in range(1, 21):
        found, guessed = one.sample_cohort(t), guess.sample_cohort(t)
        assert len(np.intersect1d(found, guessed)) < 15  # 2.5 expected by chance, fewer than 15 but for 1e-7
    back = PrivacyPlan.from_json(one.to_json(), seed=7, cohort_key=one.cohort_key)
    assert cohorts(back) == cohorts(one)
    assert cohorts(PrivacyPlan.from_json(guess.to_json(), seed=7, cohort_key=None)) == cohorts(guess)


@pytest.mark.parametrize("sampler", COHORT_SAMPLERS.built_in)
def test_reproducible_cohorts_keep_their_bits(sampler: str) -> None:
    of = Participation(sampler, 600, 30, 200, cap=35, separation=5, max_participations=200)
    key = CohortKey.reproducible(3)
    rounds = [sample_cohort(of, key=key, round_number=t).tolist() for t in range(1, 12)]
    text = ";".join(",".join(map(str, cohort)) for cohort in rounds)
    assert blake2b(text.encode(), digest_size=8).hexdigest() == BITS[sampler]


def test_the_key_is_neither_printed_nor_pickled_nor_copied() -> None:
    plan = make("poisson")
    key = plan.cohort_key
    assert key is not None
    secret = key.to_text()
    assert len(set(secret)) > 8
    shown = (plan.guarantee().statement, str(plan.parameters()))
    for text in (plan.to_json(), repr(plan), str(key), repr(key), f"{key}", *shown):
        assert secret not in text
        assert str(int(secret, 16)) not in text
        assert str(bytes.fromhex(secret)) not in text
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="neither pickled"):
            leak(key)
    with pytest.raises((TypeError, AttributeError)):
        vars(key)
    assert CohortKey.from_text(secret).to_text() == secret
    for damaged in (secret[:-1], secret + "00", "", f"x{secret[1:]}"):
        with pytest.raises(DataError) as error:
            CohortKey.from_text(damaged)
        assert secret[1:-1] not in str(error.value)


def test_a_plan_whose_key_was_deleted_samples_nobody() -> None:
    plan = PrivacyPlan.from_json(make("poisson").to_json(), seed=7, cohort_key=None)
    with pytest.raises(DataError, match="keep_cohort_key"):
        plan.sample_cohort(1)


@pytest.mark.parametrize("name", SETTINGS)
def test_known_cohorts_are_stamped_with_the_epsilon_that_nothing_amplifies(name: str) -> None:
    secret, known = make(name), make(name, **DEBUG)
    assert secret.guarantee().warnings == ()
    assert known.epsilon(20) == secret.epsilon(20)
    true = known.epsilon_with_known_cohorts(20)
    if name not in NEED_SECRET_COHORTS:
        assert (known.guarantee().warnings, true) == ((), known.epsilon(20))
        return
    (stamp,) = known.guarantee().warnings
    assert stamp.startswith("COHORTS NOT SECRET: privacy.reproducible_cohorts")
    assert stamp in known.guarantee().statement
    assert to_dict(known.guarantee())["stamps"] == [stamp]
    printed = float(stamp.partition("epsilon is ")[2].split()[0].replace(",", ""))
    assert true <= printed <= true * 1.002, "rounded up, never down"
    assert true == known.epsilon_of_this_fleet(20) > 1.5 * secret.epsilon_of_this_fleet(20)
    seen = {"separation": 4, "max_participations": 3}
    assert secret.realised_epsilon(20, **seen) == secret.epsilon(20)
    assert secret.epsilon(20) < known.realised_epsilon(20, **seen) < true


def test_the_unamplified_epsilon_is_that_of_one_gaussian_for_all_rounds_of_a_user() -> None:
    """Poisson, cut or not: 20 rounds of sensitivity 1. Banded: every fourth round, columns that do not overlap."""
    for name in ("poisson", "truncated_poisson"):
        exact = gaussian_epsilon(math.sqrt(20), 1e-6)
        assert make(name, **DEBUG).epsilon_with_known_cohorts(20) == pytest.approx(exact, rel=1e-6)
    column = square_root_column(4)  # (4,) of a user's rounds 1, 5, 9, 13, 17
    exact = gaussian_epsilon(math.sqrt(5 * float(column @ column)), 1e-6)
    assert make("cyclic_poisson", **DEBUG).epsilon_with_known_cohorts(20) == pytest.approx(exact, rel=1e-6)
    fixed = make("skellam", sampler="fixed").epsilon(20)  # the same noise but for the most devices it is shared among
    assert make("skellam", **DEBUG).epsilon_with_known_cohorts(20) == pytest.approx(fixed, rel=1e-3)


def test_a_mimicked_run_needs_no_further_stamp_but_tells_what_its_devices_got() -> None:
    mimicked: dict[str, Any] = {"population": 10**6, "expected_cohort": 5_000, "delta": 1e-7}
    (stamp,) = make("poisson", **mimicked, **DEBUG).guarantee().warnings
    assert stamp.startswith("no guarantee for this model")
    known = make("poisson", **mimicked, **DEBUG).epsilon_of_this_fleet(20)
    assert float(stamp.rpartition("epsilon ")[2].replace(",", "")) >= known
    assert known > make("poisson", **mimicked).epsilon_of_this_fleet(20)


def test_reproducible_noise_and_cohorts_do_not_imply_each_other() -> None:
    noisy = make("poisson", reproducible_noise=True)
    assert cohorts(noisy) != cohorts(make("poisson", reproducible_noise=True))
    means = [make("poisson", **DEBUG) for _ in range(2)]
    one, other = (plan.release(plan.new_sum(64), 1).mean for plan in means)
    assert not np.array_equal(one, other)


def test_stored_plans_say_where_their_cohorts_come_from() -> None:
    assert [json.loads(make("poisson", **more).to_json())["reproducible_cohorts"] for more in ({}, DEBUG)] == [
        False,
        True,
    ]
