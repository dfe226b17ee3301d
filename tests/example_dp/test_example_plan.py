"""The plan of DP-SGD: what it samples, what it releases, what it refuses, what it says."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from fedlm.config.schema import ExampleDpConfig
from fedlm.errors import BudgetExceededError, ConfigError, FedlmError
from fedlm.example_dp.clip_rule import ClipRule
from fedlm.example_dp.plan import ExamplePlan, Phase
from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.privacy.accounting.composition import Event, composed_epsilon
from fedlm.privacy.guarantee import to_dict

GIVEN = ExampleDpConfig(enabled=True, noise_multiplier=1.5, clip_norm=0.25)


def plan_of(
    config: ExampleDpConfig = GIVEN,
    num_examples: int = 1000,
    batch_size: float = 100,
    steps: tuple[int, ...] = (20,),
    reproducible: bool = False,
    seed: int = 1,
) -> ExamplePlan:
    return ExamplePlan.create(
        config, num_examples=num_examples, batch_size=batch_size, steps=steps, seed=seed, reproducible=reproducible
    )


def noise(plan: ExamplePlan, step: int, size: int = 30_000) -> npt.NDArray[np.float64]:
    """A release of zero gradients in units of its noise."""
    return plan.release({"w": torch.zeros(size, dtype=torch.float64)}, step)["w"].numpy() / plan.noise_std(step)


# --- accounting


@pytest.mark.parametrize("steps", [(60,), (20, 40), (0, 60)])
def test_calibrated_noise_spends_the_target_over_all_phases(steps: tuple[int, ...]) -> None:
    plan = plan_of(ExampleDpConfig(enabled=True, epsilon=3.0), steps=steps)
    z = plan.phases[0].noise_multiplier
    assert {phase.noise_multiplier for phase in plan.phases} == {z}
    spent = subsampled_gaussian.epsilon(sampling_probability=0.1, noise_multiplier=z, rounds=60, delta=1e-5)
    assert plan.epsilon(60) == spent
    assert 2.99 < spent <= 3.0
    assert 0 == plan.epsilon(0) < plan.epsilon(1) < plan.epsilon(59) < spent


def test_unlike_phases_compose_in_their_order() -> None:
    plan = ExamplePlan(1000, 100, (Phase(10, 2.0), Phase(5, 1.0)), 1e-5, ClipRule("flat", 1.0))
    for done, events in [(7, [Event(0.1, 2.0, 7)]), (12, [Event(0.1, 2.0, 10), Event(0.1, 1.0, 2)])]:
        assert plan.epsilon(done) == composed_epsilon(events, 1e-5)
    assert [plan.noise_std(step) for step in (9, 10)] == [0.02, 0.01]
    assert (plan.phase_steps(0), plan.phase_steps(1)) == (range(10), range(10, 15))


def test_a_budget_is_kept() -> None:
    cost = plan_of().epsilon(20)
    assert plan_of(replace(GIVEN, epsilon=cost)).num_steps == 20
    with pytest.raises(BudgetExceededError, match="noise_multiplier = 0 to calibrate"):
        plan_of(replace(GIVEN, epsilon=cost * 0.99))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: plan_of(batch_size=1001), "batch_size"),
        (lambda: plan_of(batch_size=0), "batch_size"),
        (lambda: plan_of(num_examples=0), "number of examples"),
        (lambda: plan_of(steps=()), "more epochs"),
        (lambda: plan_of(steps=(5, -1)), "steps"),
        (lambda: plan_of(replace(GIVEN, noise_multiplier=0.0)), "give one"),
        (lambda: plan_of(replace(GIVEN, noise_multiplier=1e9)), "noise multiplier"),
        (lambda: plan_of(replace(GIVEN, clip_norm=math.inf)), "contradict"),
        (lambda: plan_of(replace(GIVEN, delta=1e-13)), "delta"),
        (lambda: ExamplePlan(10, 1, (Phase(1, 0.0),), 1e-5, ClipRule("flat", 1.0)), "contradict"),
        (lambda: ExamplePlan(10, 1, (Phase(1, 1.0), Phase(1, 0.0)), 1e-5, ClipRule("flat", 1.0)), "contradict"),
    ],
)
def test_plans_without_a_guarantee_are_refused(build: Callable[[], ExamplePlan], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


# --- the sampler


def test_every_example_is_in_with_its_own_coin() -> None:
    num_steps, n, q = 4000, 60, 0.2
    plan = plan_of(num_examples=n, batch_size=q * n, steps=(num_steps,), reproducible=True)
    drawn = np.zeros((num_steps, n))
    for step in range(num_steps):
        drawn[step, plan.sample(step)] = 1
    spread = math.sqrt(q * (1 - q) / num_steps)
    assert np.abs(drawn.mean(0) - q).max() < 4.5 * spread
    # Sizes are binomial, not fixed; no pair of examples and no pair of following steps goes together.
    sizes = drawn.sum(1)
    assert stats.chisquare(*_counts(sizes, stats.binom(n, q), num_steps)).pvalue > 1e-4
    centred = (drawn - q) / math.sqrt(q * (1 - q))
    pairs = centred.T @ centred / num_steps
    assert np.abs(pairs[~np.eye(n, dtype=bool)]).max() < 5.5 / math.sqrt(num_steps)
    assert abs((centred[1:] * centred[:-1]).mean()) < 4.5 / math.sqrt(num_steps * n)


def _counts(sizes: npt.NDArray[np.float64], law: stats.rv_discrete, total: int) -> tuple[list[float], list[float]]:
    edges = [-1, 6, 8, 10, 12, 14, 16, 18, 60]
    found = [float(((sizes > low) & (sizes <= high)).sum()) for low, high in pairwise(edges)]
    return found, [total * (law.cdf(high) - law.cdf(low)) for low, high in pairwise(edges)]


def test_samples_are_sorted_repeatable_in_a_plan_and_secret_between_plans() -> None:
    plan, other = plan_of(num_examples=5000), plan_of(num_examples=5000)
    first = plan.sample(3)
    assert first.dtype == np.int64
    assert np.array_equal(first, np.unique(first))
    assert np.array_equal(first, plan.sample(3))
    assert not np.array_equal(first, plan.sample(4))
    assert not np.array_equal(first, other.sample(3)), "the seed, which is equal, must not decide a private sample"
    assert plan.step_secret(3) != other.step_secret(3)
    assert len(plan_of(batch_size=1000).sample(0)) == 1000


# --- the release


def test_release_is_the_noised_sum_over_the_expected_batch() -> None:
    plan = plan_of(num_examples=1000, batch_size=12.5)
    total = torch.linspace(-3, 3, 20_000, dtype=torch.float64).reshape(100, 200)
    release = plan.release({"w": total.clone()}, 0)["w"]
    assert release.shape == total.shape
    rest = ((release - total / 12.5) / plan.noise_std(0)).numpy().ravel()
    assert plan.noise_std(0) == pytest.approx(1.5 * 0.25 / 12.5)
    assert stats.kstest(rest, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(rest, total.ravel())[0, 1]) < 6 / math.sqrt(rest.size)


def test_noise_is_normal_and_independent_over_steps_parameters_and_plans() -> None:
    plan = plan_of(reproducible=True)  # a p-value under a fixed key cannot fail by chance
    steps = [noise(plan, step) for step in range(4)]
    assert stats.kstest(np.concatenate(steps), "norm").pvalue > 1e-3
    assert np.var(np.concatenate(steps)) == pytest.approx(1, abs=0.02)
    both = plan.release({"b": torch.zeros(30_000), "a": torch.zeros(30_000)}, 4)
    draws = [*steps, both["a"].numpy(), both["b"].numpy(), noise(plan_of(), 0), noise(plan_of(), 0)]
    correlations = np.corrcoef(draws)[~np.eye(len(draws), dtype=bool)]
    assert np.abs(correlations).max() < 6 / math.sqrt(30_000)


def test_a_restart_draws_fresh_noise_and_a_reproducible_one_does_not() -> None:
    # On a lattice of 2^-20 standard deviations a few of many coordinates meet by chance.
    assert (noise(plan_of(), 0) == noise(plan_of(), 0)).mean() < 1e-3
    assert np.array_equal(noise(plan_of(reproducible=True), 0), noise(plan_of(reproducible=True), 0))
    assert not np.array_equal(noise(plan_of(reproducible=True), 0), noise(plan_of(reproducible=True, seed=2), 0))


def test_every_coordinate_of_every_parameter_gets_noise() -> None:
    shapes = {"bias": (3,), "scalar": (), "table": (70_001, 2), "none": (0, 4)}
    release = plan_of().release({name: torch.zeros(shape) for name, shape in shapes.items()}, 0)
    assert {name: tuple(value.shape) for name, value in release.items()} == shapes
    assert all(float((value == 0).float().sum()) <= 1e-3 * value.numel() for value in release.values())  # by chance
    assert all(value.dtype == torch.float32 for value in release.values())


def test_sums_in_other_memory_orders_are_released_in_place_of_their_values() -> None:
    plan = plan_of(ExampleDpConfig(enabled=True, noise_multiplier=1e-6, clip_norm=1.0))
    total = torch.arange(12.0).reshape(3, 4)
    assert torch.allclose(plan.release({"w": total.T}, 0)["w"], total.T / 100, atol=1e-4)


def test_each_step_leaves_once() -> None:
    plan = plan_of(steps=(2, 1))
    for step in (0, 2, 1):
        noise(plan, step, 4)
    with pytest.raises(BudgetExceededError, match="already released"):
        noise(plan, 1, 4)
    for beyond in (lambda: plan.sample(3), lambda: noise(plan, 3, 4), lambda: plan.step_secret(3)):
        with pytest.raises(BudgetExceededError, match="all 3 planned steps"):
            beyond()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e9, -1e9])
def test_sums_that_nobody_clipped_release_nothing(value: float) -> None:
    plan, total = plan_of(), torch.zeros(100)
    total[41] = value
    with pytest.raises(FedlmError, match="did not clip: nothing was released"):
        plan.release({"ok": torch.zeros(2), "w": total}, 0)
    assert noise(plan, 0, 4).all(), "the step is still to be released"


def test_half_precision_sums_are_refused() -> None:
    with pytest.raises(FedlmError, match="float32"):
        plan_of().release({"w": torch.zeros(3, dtype=torch.bfloat16)}, 0)


# --- what it says, what it keeps to itself


def test_plans_can_be_neither_copied_nor_pickled() -> None:
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="privacy noise is neither pickled, copied"):
            duplicate(plan_of())
    plan = plan_of()
    assert not np.array_equal(replace(plan).sample(0), plan.sample(0)), "what is made anew has keys of its own"


def test_statement_has_every_figure_and_no_seed() -> None:
    plan = plan_of(steps=(5, 15), seed=987_654_321)
    for part in ("z = 1.5", "C = 0.25", "q = 0.1", "1,000 examples", "5 + 15", "1e-05", "Poisson", "add or remove one"):
        assert part in plan.guarantee().statement
    assert "987654321" not in f"{plan!r}{to_dict(plan.guarantee())}{plan.parameters()}"
    assert plan.guarantee().warnings == ()
    assert to_dict(plan.guarantee())["epsilon"] == plan.epsilon(20)


@pytest.mark.parametrize(
    ("plan", "stamp"),
    [
        (plan_of(ExampleDpConfig(enabled=False)), "NOT PRIVATE: example_dp.enabled is false"),
        (plan_of(reproducible=True), "NOT PRIVATE: sample and noise follow from the seed"),
        (plan_of(replace(GIVEN, delta=0.0011)), "weak guarantee: delta 0.0011"),
        (plan_of(replace(GIVEN, delta=0.001)), "weak guarantee: delta 0.001 is not below 1 / 1,000 examples"),
    ],
)
def test_what_is_no_guarantee_is_stamped(plan: ExamplePlan, stamp: str) -> None:
    assert any(found.startswith(stamp) for found in plan.guarantee().warnings)
    assert stamp in plan.guarantee().statement


def test_a_plan_without_privacy_only_averages_and_repeats_with_its_seed() -> None:
    plan, again, other = (plan_of(ExampleDpConfig(enabled=False), seed=seed) for seed in (1, 1, 2))
    assert plan.epsilon(3) == math.inf
    assert torch.equal(plan.release({"w": torch.full((3,), 1e9)}, 0)["w"], torch.full((3,), 1e7))
    assert np.array_equal(plan.sample(0), again.sample(0))
    assert not np.array_equal(plan.sample(0), other.sample(0))
    with pytest.raises(FedlmError):
        plan.release({"w": torch.tensor([math.nan])}, 1)
