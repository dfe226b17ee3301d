"""Built-in strategies against torch's optimisers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlm.config.schema import OptionValues, StrategyConfig
from fedlm.registry import STRATEGIES
from fedlm.strategies import Release, Strategy
from fedlm.trainable.spec import UpdateSpec, Vector

FULL = UpdateSpec.build([("w", "dense", (7,)), ("input_table", "rows", (10, 3))])


def run(kind: str, means: list[Vector], rows: list[np.ndarray], values: Vector, config: StrategyConfig) -> Vector:
    strategy = STRATEGIES.resolve(kind)(config)
    assert isinstance(strategy, Strategy)
    state = strategy.init(FULL, values.copy())
    for mean, ids in zip(means, rows, strict=True):
        spec = FULL.with_rows(ids)
        state, _ = strategy.step(state, Release(spec, mean.copy(), {}, noise_std=0.0))
    return state.values


def torch_run(optimiser: type[torch.optim.Optimizer], means: list[Vector], values: Vector, **options: object) -> Vector:
    parameter = torch.nn.Parameter(torch.from_numpy(values.copy()))
    reference = optimiser([parameter], **options)  # type: ignore[call-arg]
    for mean in means:
        parameter.grad = torch.from_numpy(-mean)
        reference.step()
    return parameter.detach().numpy()


@pytest.fixture
def problem() -> tuple[list[Vector], Vector]:
    rng = np.random.default_rng(0)
    means = [rng.standard_normal(FULL.size).astype(np.float32) for _ in range(6)]
    return means, rng.standard_normal(FULL.size).astype(np.float32)


def test_fedadam_with_all_rows_is_adam(problem: tuple[list[Vector], Vector]) -> None:
    means, values = problem
    c = StrategyConfig(learning_rate=0.05, options=OptionValues({"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-3}))
    ours = run("fedadam", means, [np.arange(10)] * 6, values, c)
    theirs = torch_run(torch.optim.Adam, means, values, lr=0.05, betas=(0.8, 0.95), eps=1e-3)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)


def test_fedavg_is_sgd(problem: tuple[list[Vector], Vector]) -> None:
    means, values = problem
    ours = run("fedavg", means, [np.arange(10)] * 6, values, StrategyConfig(learning_rate=0.7))
    np.testing.assert_allclose(ours, torch_run(torch.optim.SGD, means, values, lr=0.7), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", STRATEGIES.built_in)
def test_rows_outside_the_set_are_not_touched(kind: str, problem: tuple[list[Vector], Vector]) -> None:
    """Neither values nor moments: a row that sits out two rounds continues as if they had not happened."""
    _, values = problem
    ids = np.array([2, 3, 7])
    spec = FULL.with_rows(ids)
    mean = np.ones(spec.size, np.float32)
    after = run(kind, [mean], [ids], values, StrategyConfig())
    before_table, after_table = (FULL.views(v)["input_table"] for v in (values, after))
    outside = np.setdiff1d(np.arange(10), ids)
    assert np.array_equal(after_table[outside], before_table[outside])
    assert (after_table[ids] != before_table[ids]).all()
