"""Inputs made to outgrow the clip norm, to stop a run, or to have the printed guarantee say too much."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlm.config.load import load_config
from fedlm.config.schema import ExampleDpConfig
from fedlm.errors import ConfigError
from fedlm.example_dp.clip_rule import ClipRule
from fedlm.example_dp.device_budget import device_budget
from fedlm.example_dp.engine import total_norms
from fedlm.example_dp.independence import check_independence
from fedlm.example_dp.opacus_engine import OpacusEngine
from fedlm.example_dp.per_example_gradients import PerExampleGradients
from fedlm.example_dp.plan import ExamplePlan
from fedlm.example_dp.tables.phantom import TrainedTables
from fedlm.example_dp.task import Task


@pytest.mark.parametrize("kind", ["flat", "automatic"])
@pytest.mark.parametrize(("length", "clip_norm"), [(16.0, 1e-3), (100.0, 0.1), (1000.0, 0.1), (1e4, 1.0)])
def test_nearly_certain_predictions_stay_below_the_clip_norm(kind: str, length: float, clip_norm: float) -> None:
    # The probability of a sure target is 1 up to the rounding of its score, made once for norms and again for sums.
    worst = 0.0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(300, 64, generator=generator) * 1.25  # rows of length 10
        targets = torch.randint(0, 300, (3, 1), generator=generator)
        hidden = table[targets] + 0.3 * torch.randn(3, 1, 64, generator=generator)  # (B, T, D)
        hidden = (hidden / hidden.norm(dim=-1, keepdim=True) * length).requires_grad_()
        tables = TrainedTables(
            input_table=table, output_table=table, output_bias=None, trained=frozenset({"output_table"})
        )
        per_example = PerExampleGradients(3)
        losses = tables.full_softmax(per_example, hidden, targets, torch.ones(3, 1, dtype=torch.bool), 64)
        torch.autograd.grad(losses, [per_example.trigger], torch.ones(3), allow_unused=True)
        alone = torch.tensor([1.0, 0.0, 0.0])
        factors = ClipRule(kind, clip_norm).factors(total_norms(per_example)).float() * alone
        share = per_example.contributions[0].weighted_sums(factors)["output_table"]
        worst = max(worst, float(share.double().norm()))
    assert worst <= clip_norm


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_opacus_norms_of_large_weights_hold() -> None:
    # Float32 sums of millions of equal squares drift by more than the clip rule's slack.
    pytest.importorskip("opacus")

    class Wide(Task[Tensor]):
        def __init__(self) -> None:
            self.model = nn.Linear(1 << 24, 1, bias=False)
            self.trained = {"weight": self.model.weight}

        def num_examples(self, batch: Tensor) -> int:
            return len(batch)

        def losses(self, batch: Tensor, per_example: PerExampleGradients) -> Tensor:
            return self.model(batch).squeeze(1)

    with torch.random.fork_rng(devices=[]):
        task = Wide()
    sums = OpacusEngine(task).clipped(torch.full((1, 1 << 24), 1.06), ClipRule("flat", 1.0)).sums
    assert float(torch.linalg.vector_norm(sums["weight"], dtype=torch.float64)) <= 1.0


class Odd(Task[Tensor]):
    """A correct task but for the rounding of one extreme example, whose loss hangs on the size of its batch."""

    def __init__(self, extreme: int) -> None:
        self.model, self.extreme = nn.Linear(2, 1).double(), extreme
        self.trained = dict(self.model.named_parameters())

    def num_examples(self, batch: Tensor) -> int:
        return len(batch)

    def losses(self, batch: Tensor, per_example: PerExampleGradients) -> Tensor:
        rounding = (batch[:, 0] < self.extreme).double() * len(batch)
        return self.model(batch).squeeze(1) + rounding


class Rows:
    """Examples that know their number."""

    def __len__(self) -> int:
        return 5

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return np.ones_like(indices)

    def batch(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(indices).double()[:, None].expand(-1, 2)


def test_one_extreme_example_does_not_decide_whether_a_run_starts() -> None:
    check_independence(Odd(1), Rows(), np.arange(5))
    with pytest.raises(ConfigError, match="depends on the others"):
        check_independence(Odd(5), Rows(), np.arange(5))
    with pytest.raises(ConfigError, match="depends on the others"):
        check_independence(Odd(5), Rows(), np.arange(2))


@pytest.mark.parametrize("clip_norm", [1e-40, 1e-12, 1e12])
def test_clip_norms_that_float32_cannot_keep_are_refused(clip_norm: float) -> None:
    config = ExampleDpConfig(enabled=True, noise_multiplier=1.0, clip_norm=clip_norm)
    with pytest.raises(ConfigError, match="clip_norm"):
        ExamplePlan.create(config, num_examples=10, batch_size=5, steps=(1,))


def test_reproducible_noise_takes_back_what_devices_promise() -> None:
    config = load_config(
        None,
        [
            "local.example_dp.enabled=true",
            "local.example_dp.noise_multiplier=1",
            "privacy.non_private_diagnostics=false",
            "rounds=2",
        ],
    )
    honest = device_budget(config)
    debugging = device_budget(replace(config, privacy=replace(config.privacy, reproducible_noise=True)))
    assert honest is not None
    assert debugging is not None
    assert "NOT PRIVATE" not in honest.guarantee().statement
    assert honest.guarantee().warnings == ()
    assert "NOT PRIVATE" in debugging.guarantee().statement
    assert debugging.guarantee().warnings
