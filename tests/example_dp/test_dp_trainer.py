"""DP-SGD from sample to step: against one example at a time, in two worlds, over phases and failures."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlm.config.schema import ExampleDpConfig
from fedlm.errors import BudgetExceededError, ConfigError
from fedlm.example_dp.clip_rule import ClipRule
from fedlm.example_dp.per_example_gradients import PerExampleGradients
from fedlm.example_dp.plan import ExamplePlan
from fedlm.example_dp.task import Task
from fedlm.example_dp.trainer import DpTrainer, ReleaseOptimizer, StepReport

Pair = tuple[Tensor, Tensor]


class Points:
    """Examples (x, y) of a regression."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self.sizes: list[int] = []

    @classmethod
    def drawn(cls, num: int, seed: int = 1) -> Points:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num, 3, generator=generator, dtype=torch.float64)
        return cls(x, x.sum(1) + torch.randn(num, generator=generator, dtype=torch.float64))

    def __len__(self) -> int:
        return len(self.x)

    def lengths(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.ones(len(indices), np.int64)

    def batch(self, indices: npt.NDArray[np.int64]) -> Pair:
        self.sizes.append(len(indices))
        return self.x[indices], self.y[indices]


class Regression(Task[Pair]):
    """A small network and its squared error."""

    def __init__(self, seed: int = 0, trained: str = "", dropout: float = 0.0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1)).double()
        self.trained = {name: p for name, p in self.model.named_parameters() if name.endswith(trained)}
        self.begun: list[tuple[int, bytes]] = []
        self.modes: list[bool] = []

    def num_examples(self, batch: Pair) -> int:
        return len(batch[0])

    def begin_step(self, step: int, secret: bytes) -> None:
        self.begun.append((step, secret))

    def losses(self, batch: Pair, per_example: PerExampleGradients) -> Tensor:
        self.modes.append(self.model.training)
        return (self.model(batch[0]).squeeze(1) - batch[1]).square()  # (B,)

    def vector(self) -> Tensor:
        return torch.cat([value.detach().flatten() for value in self.trained.values()])


def plan_of(num_examples: int, batch_size: float, *steps: int, z: float = 1.0, clip_norm: float = 0.5) -> ExamplePlan:
    """Return a reproducible plan: two of them make the same draws."""
    config = ExampleDpConfig(enabled=True, noise_multiplier=z, clip_norm=clip_norm)
    return ExamplePlan.create(
        config, num_examples=num_examples, batch_size=batch_size, steps=steps or (1,), seed=3, reproducible=True
    )


def trainer_of(task: Regression, points: Points, plan: ExamplePlan, **options: object) -> DpTrainer[Pair]:
    settings = {"optimizer": "sgd", "learning_rate": 1.0, "physical_batch_size": 7} | options
    return DpTrainer(task, points, plan, **settings)  # type: ignore[arg-type]


def one_at_a_time(
    task: Regression, points: Points, indices: npt.NDArray[np.int64], clip_norm: float
) -> dict[str, Tensor]:
    """Return the sum of gradients, each clipped on its own."""
    total = {name: torch.zeros_like(value) for name, value in task.trained.items()}
    for index in indices:
        loss = task.losses((points.x[[index]], points.y[[index]]), PerExampleGradients(1)).sum()
        gradients = torch.autograd.grad(loss, list(task.trained.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for name, gradient in zip(task.trained, gradients, strict=True):
            # The clip rule keeps a slack of 0.1 % below the clip norm.
            total[name] += gradient * min(1.0, clip_norm / 1.001 / norm)
    return total


@pytest.mark.parametrize("trained", ["", "bias"])
def test_steps_are_those_of_one_example_at_a_time(trained: str) -> None:
    points, task, reference = Points.drawn(40), Regression(trained=trained), Regression(trained=trained)
    trainer, plan = trainer_of(task, points, plan_of(40, 15, 4), learning_rate=0.1), plan_of(40, 15, 4)
    for step in range(4):
        trainer.step()
        release = plan.release(one_at_a_time(reference, points, plan.sample(step), 0.5), step)
        with torch.no_grad():
            for name, value in reference.trained.items():
                value -= 0.1 * release[name]
    assert torch.allclose(task.vector(), reference.vector(), rtol=0, atol=1e-9)
    first = dict(Regression().model.named_parameters())
    moved = {name for name, value in task.model.named_parameters() if not torch.equal(value, first[name])}
    assert moved == task.trained.keys()


def test_physical_batches_do_not_change_what_is_released() -> None:
    ends = []
    for physical in (1, 3, 1000):
        task, points = Regression(), Points.drawn(60)
        trainer_of(task, points, plan_of(60, 20, 3), physical_batch_size=physical).train()
        assert max(points.sizes[-2:]) <= physical
        ends.append(task.vector())
    for end in ends[1:]:
        assert torch.allclose(end, ends[0], rtol=0, atol=1e-9)


def test_opacus_engine_makes_the_same_steps() -> None:
    pytest.importorskip("opacus")
    ends = []
    for engine in ("fedlm", "opacus"):
        task = Regression()
        trainer_of(task, Points.drawn(30), plan_of(30, 10, 2), engine=engine).train()
        ends.append(task.vector())
    assert torch.allclose(ends[0], ends[1], rtol=0, atol=1e-9)


# --- attacks


COORDINATE = st.one_of(st.floats(-5, 5), st.sampled_from([0.0, 1e-300, 1e30, -1e150, 1e308, math.inf, math.nan]))


@settings(max_examples=60, deadline=None)
@given(victim=st.tuples(*[COORDINATE] * 4), copies=st.integers(0, 2), kind=st.sampled_from(["flat", "automatic"]))
def test_one_example_moves_the_sum_by_no_more_than_the_clip_norm(
    victim: tuple[float, ...], copies: int, kind: str
) -> None:
    # q = 1 and equal keys: the same noise in both worlds, so releases times divisors differ by the example alone.
    base = Points.drawn(5, seed=2)
    row, others = torch.tensor([victim], dtype=torch.float64), [base.x, base.y]
    moved = []
    for count in (copies, copies + 1):
        points = Points(torch.cat([others[0], *[row[:, :3]] * count]), torch.cat([others[1], *[row[:, 3]] * count]))
        config = ExampleDpConfig(enabled=True, noise_multiplier=1.0, clip_norm=0.5, clipping=kind)
        n = len(points)
        plan = ExamplePlan.create(config, num_examples=n, batch_size=n, steps=(1,), seed=3, reproducible=True)
        task = Regression()
        start = task.vector()
        trainer_of(task, points, plan, physical_batch_size=3).step()
        moved.append((start - task.vector()) * n)
    difference = float((moved[1] - moved[0]).norm())
    assert difference <= 0.5 * (1 + 1e-9)
    if not all(math.isfinite(value) for value in victim):
        assert difference < 1e-9, "an example without a finite gradient counts as zero"


def test_the_bound_is_reached_and_so_not_vacuous() -> None:
    points = Points.drawn(5)
    points.y[4] = 1e6
    moved = []
    for n in (4, 5):
        task = Regression()
        start = task.vector()
        trainer_of(task, Points(points.x[:n], points.y[:n]), plan_of(n, n)).step()
        moved.append((start - task.vector()) * n)
    assert float((moved[1] - moved[0]).norm()) == pytest.approx(0.5 / 1.001, rel=1e-6)


def test_an_empty_sample_releases_noise() -> None:
    points, task = Points.drawn(4), Regression()
    trainer = trainer_of(task, points, plan_of(4, 1e-6, 5))
    before = task.vector()
    report = trainer.step()
    assert (report.non_private_num_sampled, points.sizes) == (0, [])
    assert math.isnan(report.non_private_loss)
    assert bool((task.vector() != before).all())
    assert report.release_norm == pytest.approx(report.noise_norm, rel=0.8)


class InBatch(Regression):
    """Each loss is measured against the batch's mean: what in-batch negatives and batch statistics amount to."""

    def losses(self, batch: Pair, per_example: PerExampleGradients) -> Tensor:
        predicted = self.model(batch[0]).squeeze(1)
        return (predicted - predicted.mean() - batch[1]).square()


def test_losses_that_depend_on_other_examples_are_refused_before_anything_leaves() -> None:
    task = InBatch()
    before = task.vector()
    with pytest.raises(ConfigError, match="depend"):
        trainer_of(task, Points.drawn(20), plan_of(20, 15, 3)).step()
    assert torch.equal(task.vector(), before)


# --- what tasks draw


def test_tasks_hear_of_a_step_once_with_a_new_secret() -> None:
    secrets = []
    for physical in (1, 100):
        task = Regression()
        trainer_of(task, Points.drawn(30), plan_of(30, 12, 3), physical_batch_size=physical).train()
        assert [step for step, _ in task.begun if step] == [1, 2]
        secrets.append(task.begun)
    assert secrets[0] == secrets[1]
    assert len({secret for _, secret in secrets[0]}) == 3


def test_dropout_follows_from_the_steps_secret_and_leaves_the_global_generator_alone() -> None:
    ends = []
    for outside in (1, 2):
        torch.manual_seed(outside)
        state = torch.random.get_rng_state()
        task = Regression(dropout=0.5)
        trainer_of(task, Points.drawn(30), plan_of(30, 12, 2)).train()
        assert torch.equal(torch.random.get_rng_state(), state)
        ends.append(task.vector())
    assert torch.equal(ends[0], ends[1])
    without = Regression(dropout=0.0)
    trainer_of(without, Points.drawn(30), plan_of(30, 12, 2)).train()
    assert not torch.allclose(without.vector(), ends[0])


def test_models_train_in_training_mode_and_get_their_modes_back() -> None:
    task = Regression()
    task.model.eval()
    task.model[1].train()
    trainer = trainer_of(task, Points.drawn(30), plan_of(30, 12, 2))
    trainer.step()
    task.modes.clear()
    trainer.step()
    assert set(task.modes) == {True}
    assert [module.training for module in task.model] == [False, True, False, False]
    assert all(p.grad is None for p in task.model.parameters())


def test_frozen_batch_norm_stays_frozen() -> None:
    task = Regression()
    task.model = nn.Sequential(nn.BatchNorm1d(3).double().requires_grad_(False), task.model).eval()
    task.trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    trainer_of(task, Points.drawn(30), plan_of(30, 12, 2)).train()
    assert torch.equal(task.model[0].running_mean, torch.zeros(3, dtype=torch.float64))


# --- plan and phases


def test_phases_share_one_plan_and_train_what_their_task_says() -> None:
    plan, points = plan_of(30, 10, 3, 2), Points.drawn(30)
    full = Regression()
    reports: list[StepReport] = []
    trainer = trainer_of(full, points, plan)
    trainer.train(reports.append)
    bias = Regression(trained="bias")
    bias.model.load_state_dict(full.model.state_dict())
    trainer_of(bias, points, plan, phase=1).train(reports.append)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5]
    weights = [p for name, p in bias.model.named_parameters() if name.endswith("weight")]
    assert all(
        torch.equal(p, q) for p, q in zip(weights, [full.trained["0.weight"], full.trained["3.weight"]], strict=True)
    )
    assert not torch.equal(bias.trained["0.bias"], full.trained["0.bias"])
    with pytest.raises(BudgetExceededError, match="all 3 steps of this phase"):
        trainer.step()
    with pytest.raises(BudgetExceededError, match="already released"):
        trainer_of(full, points, plan).step()


class Breaks(Points):
    """Fails at its third batch, once."""

    def batch(self, indices: npt.NDArray[np.int64]) -> Pair:
        if len(self.sizes) == 2:
            self.sizes.append(0)
            raise MemoryError
        return super().batch(indices)


def test_a_step_that_failed_before_its_release_is_made_again_with_the_same_sample() -> None:
    good, bad = Points.drawn(40), Points.drawn(40)
    bad = Breaks(bad.x, bad.y)
    ends = []
    for points in (good, bad):
        task = Regression()
        trainer = trainer_of(task, points, plan_of(40, 30, 2), physical_batch_size=2)
        while trainer.steps_left:
            try:
                trainer.step()
            except MemoryError:
                assert torch.equal(task.vector(), Regression().vector())
        ends.append(task.vector())
    assert torch.allclose(ends[0], ends[1], rtol=0, atol=1e-12)


def test_reports_say_what_is_private() -> None:
    points, task = Points.drawn(30), Regression()
    points.x[4] = math.nan
    plan = plan_of(30, 30)
    reference = Regression()
    report = trainer_of(task, points, plan).step()
    finite = np.delete(np.arange(30), 4)
    losses = reference.losses((points.x[finite], points.y[finite]), PerExampleGradients(29))
    assert report.non_private_loss == pytest.approx(float(losses.detach().mean()), rel=1e-12)
    assert (report.non_private_num_sampled, report.non_private_num_rejected) == (30, 1)
    assert report.noise_norm == pytest.approx(0.5 / 30 * math.sqrt(task.vector().numel()))
    assert report.release_norm == pytest.approx(float((reference.vector() - task.vector()).norm()), rel=1e-9)
    assert 0 < report.non_private_clipped_fraction <= 1


def test_without_privacy_it_is_sgd() -> None:
    points, task, reference = Points.drawn(20), Regression(), Regression()
    plan = ExamplePlan.create(ExampleDpConfig(), num_examples=20, batch_size=20, steps=(5,))
    trainer_of(task, points, plan, optimizer="adam", learning_rate=0.01).train()
    optimizer = torch.optim.Adam(reference.model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        reference.losses((points.x, points.y), PerExampleGradients(20)).mean().backward()
        optimizer.step()
    assert torch.allclose(task.vector(), reference.vector(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_plain_tensors_are_moved_in_their_own_memory(kind: str) -> None:
    table, bare = nn.Parameter(torch.ones(4, 2)), torch.ones(4, 2)
    optimizer = ReleaseOptimizer(kind, {"a": table, "b": bare}, 0.1)
    where = (table.data_ptr(), bare.data_ptr())
    for _ in range(3):
        optimizer.step({"a": torch.full((4, 2), 2.0), "b": torch.full((4, 2), 2.0)})
    assert (table.data_ptr(), bare.data_ptr()) == where
    assert torch.equal(table, bare)
    assert float(bare[0, 0]) == pytest.approx(1 - 3 * 0.1 * (1 if kind == "adam" else 2), abs=1e-6)
    assert table.grad is None
    assert bare.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer = 'lion'"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"engine": "jax"}, "engine = 'jax'"),
        ({"physical_batch_size": 0}, "physical_batch_size"),
        ({"phase": 1}, "phase"),
    ],
)
def test_what_cannot_train_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_of(Regression(), Points.drawn(10), plan_of(10, 5), **options)


def test_data_of_another_size_and_tasks_that_train_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="10 examples, the data has 11"):
        trainer_of(Regression(), Points.drawn(11), plan_of(10, 5))
    with pytest.raises(ConfigError, match="nothing trains"):
        trainer_of(Regression(trained="none"), Points.drawn(10), plan_of(10, 5))


def test_the_clip_rule_is_the_plans() -> None:
    assert plan_of(10, 5).rule == ClipRule("flat", 0.5)
