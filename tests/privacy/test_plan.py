"""The plan: cohorts, releases, budget, resume, statement."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from fedlm.config.schema import PrivacyConfig
from fedlm.errors import BudgetExceededError, ConfigError, DataError
from fedlm.privacy import ClippedSum, ClipSpec, PrivacyPlan
from fedlm.privacy.clipping.clipped_sum import new_sum
from fedlm.privacy.guarantee import to_dict
from fedlm.privacy.sampling.cohort_key import CohortKey
from fedlm.randomness import round_key, stream

SIZE = 100_000
KEY = CohortKey.reproducible(7)


def figures_of(plan: PrivacyPlan) -> dict[str, object]:
    """Return what a run stores of its guarantee."""
    return {**to_dict(plan.guarantee()), **plan.parameters()}


def make(
    *,
    rounds: int = 20,
    fleet_size: int = 2_000,
    cohort: int = 50,
    seed: int = 7,
    key: CohortKey = KEY,
    **privacy: Any,
) -> PrivacyPlan:
    config = PrivacyConfig(**({"epsilon": 0.0, "noise_multiplier": 1.0, "clip_norm": 0.3} | privacy))
    return PrivacyPlan.create(config, rounds=rounds, fleet_size=fleet_size, cohort=cohort, seed=seed, cohort_key=key)


def filled(plan: PrivacyPlan, num_devices: int, size: int = SIZE) -> tuple[ClippedSum, npt.NDArray[np.float64]]:
    total = plan.new_sum(size)
    update = np.linspace(-1e-3, 1e-3, size).astype(np.float32)
    for _ in range(num_devices):
        total.add(update)
    return total, num_devices * update.astype(np.float64)


class TestCohort:
    def test_size_is_binomial(self) -> None:
        plan = make(rounds=2_000, fleet_size=1_000, cohort=100)
        sizes = np.array([plan.sample_cohort(number).size for number in range(2_000)])
        variance = 1_000 * 0.1 * 0.9
        assert sizes.mean() == pytest.approx(100, abs=5 * math.sqrt(variance / 2_000))
        assert sizes.var() == pytest.approx(variance, rel=5 * math.sqrt(2 / 2_000))

    def test_devices_flip_independent_coins_of_one_probability(self) -> None:
        plan = make(rounds=3_000, fleet_size=40, cohort=10)
        present = np.zeros((3_000, 40))
        for number in range(3_000):
            present[number, plan.sample_cohort(number)] = 1
        deviation = math.sqrt(0.25 * 0.75 / 3_000)
        assert np.abs(present.mean(axis=0) - 0.25).max() < 5 * deviation
        among_devices = np.corrcoef(present.T) - np.eye(40)
        assert np.abs(among_devices).max() < 5.5 / math.sqrt(3_000)
        lag_one = [np.corrcoef(present[:-1, d], present[1:, d])[0, 1] for d in range(40)]
        assert np.abs(lag_one).max() < 5 / math.sqrt(3_000)

    def test_ids_are_sorted_and_depend_on_key_and_round_only(self) -> None:
        plan, other_order = make(), make(noise_multiplier=2.0)
        forwards = [plan.sample_cohort(number) for number in range(5)]
        backwards = [other_order.sample_cohort(number) for number in reversed(range(5))][::-1]
        for one, two in zip(forwards, backwards, strict=True):
            assert one.dtype == np.int64
            assert np.array_equal(one, two)
            assert np.array_equal(one, np.unique(one))
        assert not np.array_equal(forwards[0], forwards[1])
        assert not np.array_equal(forwards[0], make(key=CohortKey.reproducible(8)).sample_cohort(0))

    def test_a_coin_is_the_devices_own(self) -> None:
        # At the same probability, a larger fleet changes nobody else's coin.
        small = make(fleet_size=1_000, cohort=100).sample_cohort(3)
        large = make(fleet_size=3_000, cohort=300).sample_cohort(3)
        assert np.array_equal(large[large < 1_000], small)

    def test_a_sampled_device_cannot_compute_the_cohort_from_its_round_key(self) -> None:
        coins = stream(round_key(7, 1), "cohort").random(2_000)
        guess = np.flatnonzero(coins < 50 / 2_000)
        assert np.intersect1d(guess, make().sample_cohort(1)).size < 10  # by chance about one

    def test_everyone_joins_at_probability_one(self) -> None:
        assert np.array_equal(make(fleet_size=50, cohort=50).sample_cohort(1), np.arange(50))


class TestRelease:
    def test_mean_and_noise(self) -> None:
        plan = make()
        total, exact = filled(plan, 20)
        released = plan.release(total, 3).mean
        assert released.dtype == np.float32
        noise = (released - exact / 50) / (1.0 * 0.3 / 50)  # the expected cohort divides, 20 devices came
        assert stats.kstest(noise, "norm").pvalue > 1e-6
        assert noise.mean() == pytest.approx(0, abs=6 / math.sqrt(SIZE))
        assert noise.std() == pytest.approx(1, abs=6 / math.sqrt(2 * SIZE))

    def test_the_denominator_and_the_noise_do_not_depend_on_who_came(self) -> None:
        few, many = (make(reproducible_noise=True) for _ in range(2))
        total_few, exact_few = filled(few, 2)
        total_many, exact_many = filled(many, 30)
        for _ in range(3):
            total_many.add(np.full(SIZE, np.nan, np.float32))
        difference = many.release(total_many, 1).mean - few.release(total_few, 1).mean
        np.testing.assert_allclose(difference, (exact_many - exact_few) / 50, atol=1e-8)

    def test_an_empty_cohort_releases_noise_on_every_coordinate(self) -> None:
        plan = make()
        released = plan.release(plan.new_sum(SIZE), 1).mean
        assert released.std() == pytest.approx(0.3 / 50, rel=0.02)
        assert np.count_nonzero(released) > 0.999 * SIZE

    def test_the_population_scales_the_noise_and_not_the_mean(self) -> None:
        plan = make(population=1_000_000, expected_cohort=5_000)
        total, exact = filled(plan, 30)
        noise = plan.release(total, 1).mean - exact / 50
        assert noise.std() == pytest.approx(0.3 / 5_000, rel=0.02)
        assert noise.mean() == pytest.approx(0, abs=0.3 / 5_000 * 6 / math.sqrt(SIZE))

    def test_disabled_neither_clips_nor_noises(self) -> None:
        plan = make(enabled=False)
        total = plan.new_sum(3)
        assert not total.add(np.array([10.0, -20.0, 0.5], np.float32)).clipped
        mean = np.array([10.0, -20.0, 0.5], np.float32) / np.float32(50)
        assert np.array_equal(plan.release(total, 1).mean, mean)

    def test_noise_is_fresh_in_every_round_and_plan(self) -> None:
        plan, again = make(), make()
        noise = [plan.release(plan.new_sum(SIZE), number).mean for number in (1, 2)]
        noise.append(again.release(again.new_sum(SIZE), 1).mean)
        correlations = np.corrcoef(noise) - np.eye(3)
        assert np.abs(correlations).max() < 6 / math.sqrt(SIZE)

    @pytest.mark.parametrize("reproducible", [False, True])
    def test_another_process_repeats_reproducible_noise_only(self, reproducible: bool) -> None:
        program = (
            "import sys; from fedlm.config.schema import PrivacyConfig;"
            "from fedlm.privacy import PrivacyPlan;"
            "config = PrivacyConfig("
            "    epsilon=0.0, noise_multiplier=1.0, reproducible_noise=sys.argv[1] == 'True');"
            "plan = PrivacyPlan.create(config, rounds=20, fleet_size=2000, cohort=50, seed=7);"
            "sys.stdout.write(plan.release(plan.new_sum(64), 1).mean.tobytes().hex())"
        )
        theirs = subprocess.run(
            [sys.executable, "-c", program, str(reproducible)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        plan = make(reproducible_noise=reproducible)
        assert (plan.release(plan.new_sum(64), 1).mean.tobytes().hex() == theirs) is reproducible

    def test_a_round_is_released_once(self) -> None:
        plan = make()
        plan.release(plan.new_sum(4), 1)
        with pytest.raises(BudgetExceededError, match="round 1 was already released"):
            plan.release(plan.new_sum(4), 1)
        plan.release(plan.new_sum(4), 2)

    def test_a_sum_is_released_once(self) -> None:
        plan = make()
        total = plan.new_sum(4)
        plan.release(total, 1)
        with pytest.raises(BudgetExceededError, match="already released"):
            plan.release(total, 2)
        plan.release(plan.new_sum(4), 2)

    def test_threads_racing_for_a_round_get_one_release(self) -> None:
        plan, released, barrier = make(), [], threading.Barrier(8)

        def race() -> None:
            barrier.wait()
            with contextlib.suppress(BudgetExceededError):
                released.append(plan.release(plan.new_sum(1000), 1).mean)

        threads = [threading.Thread(target=race) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(released) == 1

    def test_the_release_after_the_last_is_refused(self) -> None:
        plan = make(rounds=3)
        for number in range(3):
            plan.check_release(number)
            plan.release(plan.new_sum(4), number)
        with pytest.raises(BudgetExceededError, match="3 are paid for"):
            plan.check_release(3)
        with pytest.raises(BudgetExceededError, match="all 3 planned"):
            plan.release(plan.new_sum(4), 3)
        with pytest.raises(ConfigError, match="round = 4"):
            plan.release(plan.new_sum(4), 4)
        make(rounds=3, enabled=False).check_release(1_000)

    def test_foreign_and_overfull_sums_are_refused(self) -> None:
        plan = make()
        with pytest.raises(DataError, match="made by this plan"):
            plan.release(new_sum(ClipSpec(0.4), 4), 1)
        with pytest.raises(DataError, match="made by this plan"):
            plan.release(np.zeros(4, np.float32), 1)  # type: ignore[arg-type]
        sampled = plan.sample_cohort(1).size
        total = filled(plan, sampled + 1, size=4)[0]
        with pytest.raises(DataError, match=f"sampled {sampled}"):
            plan.release(total, 1)
        plan.release(filled(plan, sampled, size=4)[0], 1)


class TestCreation:
    def test_calibrates_to_epsilon(self) -> None:
        plan = make(epsilon=2.0, noise_multiplier=0.0, rounds=100)
        assert 2 * (1 - 1e-3) <= plan.epsilon(100) <= 2
        assert plan.epsilon(0) == 0
        assert plan.epsilon(50) < plan.epsilon(100)
        assert plan.epsilon_of_this_fleet(100) == plan.epsilon(100)

    def test_the_simulated_fleet_is_accounted_at_its_own_noise_and_sampling(self) -> None:
        plan = make(population=20_000, expected_cohort=100, noise_multiplier=4.0)
        same = make(noise_multiplier=2.0)  # 50 of 2,000 with the noise of 4.0 * 50 / 100
        assert plan.epsilon_of_this_fleet(20) == same.epsilon(20) > plan.epsilon(20)

    def test_population_alone_keeps_the_cohort(self) -> None:
        plan = make(population=100_000)
        assert (plan.population, plan.expected_cohort) == (100_000, 50)
        assert plan.sampling_probability == 0.0005

    def test_too_little_noise_for_the_budget_is_refused(self) -> None:
        with pytest.raises(BudgetExceededError, match="costs epsilon"):
            make(epsilon=1.0, noise_multiplier=0.5)
        assert make(epsilon=10.0, noise_multiplier=2.0).noise_multiplier == 2.0

    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            ({"cohort": 3_000}, "fleet.cohort"),
            ({"cohort": 3_000, "epsilon": 1.0, "noise_multiplier": 0.0}, "fleet.cohort"),
            ({"cohort": 0}, "fleet.cohort"),
            ({"fleet_size": 0}, "fleet_size"),
            ({"fleet_size": 10**7, "cohort": 5 * 10**6}, "fleet.cohort"),
            ({"population": 10, "expected_cohort": 20}, "privacy.expected_cohort"),
            ({"population": 10}, "privacy.expected_cohort"),
            ({"epsilon": 0.0, "noise_multiplier": 0.0}, "privacy.epsilon"),
            ({"noise_multiplier": math.nan}, "privacy.noise_multiplier"),
            ({"noise_multiplier": 1e6}, "noise multiplier"),
            ({"delta": 1e-13}, "privacy.delta"),
            ({"epsilon": math.nan}, "privacy.epsilon"),
            ({"epsilon": -1.0}, "privacy.epsilon"),
            ({"clip_norm": math.inf}, "privacy.clip_norm|clip norm"),
            ({"clip_norm": math.nan}, "privacy.clip_norm|clip norm"),
            ({"rounds": 0}, "rounds"),
            ({"mechanism": "laplace"}, "privacy.mechanism"),
            ({"seed": -1}, "seed"),
        ],
    )
    def test_ranges(self, arguments: dict[str, Any], name: str) -> None:
        with pytest.raises(ConfigError, match=f"^({name})[^\n]*$"):
            make(**arguments)

    def test_cannot_be_built_altered_pickled_or_copied(self) -> None:
        plan = make()
        with pytest.raises(dataclasses.FrozenInstanceError):
            plan.noise_multiplier = 0.1  # type: ignore[misc]
        with pytest.raises((TypeError, ValueError)):
            dataclasses.replace(plan, noise_multiplier=0.1)
        fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan) if field.init}
        with pytest.raises(TypeError, match="create or from_json"):
            PrivacyPlan(**fields, _token=None)
        for copying in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="neither pickled nor copied"):
                copying(plan)


class TestResume:
    @pytest.mark.parametrize(
        "privacy",
        [{"epsilon": 2.0, "noise_multiplier": 0.0}, {}, {"enabled": False}, {"population": 10**6}],
    )
    def test_stored_plans_come_back_bit_for_bit(self, privacy: dict[str, Any]) -> None:
        plan = make(**privacy)
        back = PrivacyPlan.from_json(plan.to_json(), seed=7, cohort_key=KEY)
        assert back == plan
        assert back.noise_multiplier.hex() == plan.noise_multiplier.hex()
        assert back.guarantee().statement == plan.guarantee().statement
        assert np.array_equal(back.sample_cohort(5), plan.sample_cohort(5))

    def test_the_seed_is_nowhere_in_what_is_stored_or_printed(self) -> None:
        plan = make(seed=918_273_645)
        for text in (plan.to_json(), repr(plan), plan.guarantee().statement, json.dumps(figures_of(plan))):
            assert "918273645" not in text

    @pytest.mark.parametrize(
        "change",
        [{"noise_multiplier": 0.1}, {"epsilon_target": 0.5}, {"delta": 1e-9}],
    )
    def test_a_stored_plan_that_breaks_its_budget_is_refused(self, change: dict[str, Any]) -> None:
        stored = json.loads(make(epsilon=2.0, noise_multiplier=0.0).to_json()) | change
        with pytest.raises(BudgetExceededError):
            PrivacyPlan.from_json(json.dumps(stored), seed=7, cohort_key=KEY)

    @pytest.mark.parametrize(
        "change",
        [{"noise_multiplier": "1.0"}, {"enabled": 1}, {"cohort": 50.0}, {"extra": 1}, {"delta": None}],
    )
    def test_damaged_plans_are_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(DataError, match="stored privacy plan"):
            PrivacyPlan.from_json(json.dumps(json.loads(make().to_json()) | change), seed=7, cohort_key=KEY)

    @pytest.mark.parametrize("change", [{"enabled": False}, {"rounds": 2_000}, {"noise_multiplier": 0.0}])
    def test_contradictory_plans_are_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="contradict"):
            PrivacyPlan.from_json(json.dumps(json.loads(make().to_json()) | change), seed=7, cohort_key=KEY)

    @pytest.mark.parametrize("text", ["", "[]", "{", "null"])
    def test_what_is_not_a_plan_is_refused(self, text: str) -> None:
        with pytest.raises(DataError, match="stored privacy plan"):
            PrivacyPlan.from_json(text, seed=7, cohort_key=KEY)


class TestStatement:
    def test_names_every_figure(self) -> None:
        plan = make(rounds=1_500, fleet_size=1_000_000, cohort=1_000)
        text = plan.guarantee().statement
        for part in (
            *("unit: user", "add or remove one", "1,500 releases", "Poisson", "Gaussian"),
            "1,000 / 1,000,000 = 0.001",
            *("z = 1", "C = 0.3", "epsilon 0.2214", "delta 1e-06", "PLD", "do not know the cohorts"),
        ):
            assert part in text
        assert make(rounds=1_500, fleet_size=999_999, cohort=1_000).guarantee().warnings == ()

    def test_printed_epsilon_is_never_below_the_computed_one(self) -> None:
        for z in (0.6, 0.9, 1.7, 4.0):
            plan = make(noise_multiplier=z)
            printed = float(plan.guarantee().statement.split("epsilon ")[1].split()[0])
            assert plan.epsilon(20) <= printed <= plan.epsilon(20) * 1.001 + 1e-12

    def test_disabled_is_stamped(self) -> None:
        plan = make(enabled=False)
        assert plan.epsilon(1) == plan.epsilon_of_this_fleet(1) == math.inf
        assert plan.guarantee().warnings[0].startswith("NOT PRIVATE: ")
        assert plan.guarantee().warnings[0] in plan.guarantee().statement

    def test_reproducible_noise_is_stamped(self) -> None:
        plan = make(reproducible_noise=True)
        assert plan.guarantee().warnings[0].startswith("NOT PRIVATE: ")
        assert plan.guarantee().warnings[0] in plan.guarantee().statement
        assert plan.epsilon_of_this_fleet(1) == math.inf

    def test_a_mimicked_population_is_stamped_with_both_figures(self) -> None:
        plan = make(population=1_000_000, expected_cohort=5_000, delta=1e-7)
        (stamp,) = plan.guarantee().warnings
        assert stamp.startswith("no guarantee for this model: ")
        printed = float(stamp.rpartition("epsilon ")[2].replace(",", ""))
        true = plan.epsilon_of_this_fleet(20)
        assert true <= printed <= true * 1.002, "rounded up, never down"
        assert "5,000 of 1,000,000" in stamp
        assert "50 of 2,000" in stamp
        assert stamp in plan.guarantee().statement
        assert make(population=2_000, expected_cohort=50).guarantee().warnings == ()

    @pytest.mark.parametrize(
        ("privacy", "population"),
        [({}, 2_000), ({"population": 1_000_000, "expected_cohort": 5_000}, 1_000_000)],
    )
    def test_a_delta_at_which_whole_users_may_be_published_is_stamped(
        self, privacy: dict[str, Any], population: int
    ) -> None:
        words = f"is not below 1 / {population:,} users"
        for delta, is_large in ((0.999 / population, False), (1 / population, True), (0.1, True)):
            plan = make(delta=delta, **privacy)
            found = [stamp for stamp in plan.guarantee().warnings if stamp.startswith("weak guarantee: ")]
            assert [words in stamp for stamp in found] == [True] * is_large
            assert (words in plan.guarantee().statement) == is_large

    @pytest.mark.parametrize("accounted", [{"population": 4_000}, {"expected_cohort": 500}, {"expected_cohort": 20}])
    def test_a_fleet_that_differs_in_one_number_alone_is_stamped(self, accounted: dict[str, int]) -> None:
        """As many users in other cohorts, or as large cohorts of other users: the noise is not this fleet's."""
        plan = make(**({"population": 2_000, "expected_cohort": 50} | accounted))
        (stamp,) = plan.guarantee().warnings
        assert stamp.startswith("no guarantee for this model: ")
        assert stamp in plan.guarantee().statement
        assert figures_of(plan)["stamps"] == [stamp]
        assert plan.realised_epsilon(5, separation=1, max_participations=5) == math.inf

    @pytest.mark.parametrize("privacy", [{}, {"enabled": False}, {"reproducible_noise": True}])
    def test_figures_are_strict_json_and_agree_with_the_plan(self, privacy: dict[str, Any]) -> None:
        plan = make(**privacy)
        figures = json.loads(json.dumps(figures_of(plan), allow_nan=False))
        assert figures["privacy_statement"] == plan.guarantee().statement
        assert figures["stamps"] == list(plan.guarantee().warnings)
        assert figures["epsilon"] == (plan.epsilon(20) if plan.enabled else None)
        assert {"delta", "noise_multiplier", "population", "expected_cohort", "clip_norm"} <= figures.keys()
