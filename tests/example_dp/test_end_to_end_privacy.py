"""Two worlds, one example apart: what whole DP-SGD steps of a tied transformer tell never beats the accounted epsilon.

The attacker knows everything but the coins and the noise, and projects each release onto the direction in which the
two worlds differ: for a Gaussian in one direction the best statistic there is. Keys are fixed, so the test is not left
to chance.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from torch import Tensor

from fedlm.config.schema import Config, DataConfig, ExampleDpConfig, LossConfig, ModelConfig
from fedlm.data.batching import Batch
from fedlm.example_dp.clip_rule import ClipRule
from fedlm.example_dp.engine import PerExampleEngine
from fedlm.example_dp.language import LanguageTask, Sequences
from fedlm.example_dp.plan import ExamplePlan
from fedlm.example_dp.trainer import DpTrainer
from fedlm.models.factory import build_model
from fedlm.randomness import seed_key
from fedlm.trainable.build import Trainable
from fedlm.trainable.spec import UpdateSpec

V, LENGTH = 12, 4
FREQUENCIES = np.full(V, 1 / V)
CONFIG = Config(
    data=DataConfig(sequence_length=LENGTH),
    model=ModelConfig(name="transformer", d_model=4, num_layers=1, num_heads=1, d_hidden=4, tied=True, dropout=0.0),
    loss=LossConfig(kind="full_softmax", chunk=16),
)
RUNS, DELTA, CONFIDENCE = 300, 0.1, 0.99
Z, CLIP_NORM = 1.0, 0.5


def task() -> LanguageTask:
    model = build_model(CONFIG, FREQUENCIES, 3)
    parameters = {name: parameter.requires_grad_() for name, parameter in model.named_parameters()}
    spec = UpdateSpec.build([(name, "dense", tuple(p.shape)) for name, p in parameters.items()])
    tables = frozenset({"input_table"})
    return LanguageTask(
        Trainable(model, parameters, spec), CONFIG, FREQUENCIES, tables=tables, negatives_key=seed_key(1)
    )


def world(num_examples: int) -> Sequences:
    """The first few of four sequences; the last one is the victim."""
    tokens = np.random.default_rng(5).integers(1, V, (4, LENGTH + 1))
    tokens[3] = V - 1
    tokens = tokens[:num_examples]
    mask = np.ones((num_examples, LENGTH), np.bool_)
    return Sequences(Batch(tokens[:, :-1], tokens[:, 1:], mask))


def vector(tensors: dict[str, Tensor]) -> npt.NDArray[np.float64]:
    return np.concatenate([tensors[name].detach().double().flatten().numpy() for name in sorted(tensors)])


@lru_cache(maxsize=8)
def clipped_sum(*indices: int) -> npt.NDArray[np.float64]:
    """The sum of some clipped gradients; everybody's is nearly as long as the clip norm."""
    clipped = PerExampleEngine(task()).clipped(world(4).batch(np.array(indices)), ClipRule("automatic", CLIP_NORM))
    return vector(clipped.sums)


def direction() -> npt.NDArray[np.float64]:
    found = clipped_sum(3)
    assert 0.9 * CLIP_NORM < np.linalg.norm(found) <= CLIP_NORM
    return found / np.linalg.norm(found)


@lru_cache(maxsize=8)
def statistics(num_examples: int, q: float, noise: float = 1.0) -> npt.NDArray[np.float64]:
    """Many first steps, each from the same weights: what they tell of the victim, in units of the accounted noise.

    `noise` is the part of the accounted noise that is really drawn.
    """
    trained, examples, plan = task(), world(num_examples), plan_of(num_examples, q, noise)
    trainer = DpTrainer(trained, examples, plan, optimizer="sgd", learning_rate=1.0, physical_batch_size=8)
    start = {name: tensor.detach().clone() for name, tensor in trained.trained.items()}
    found = []
    while trainer.steps_left:
        trainer.step()
        moved = vector({name: start[name] - tensor.detach() for name, tensor in trained.trained.items()})
        found.append(float(moved @ direction()) * plan.batch_size / (Z * CLIP_NORM))
        with torch.no_grad():
            for name, tensor in trained.trained.items():
                tensor.copy_(start[name])
    return np.array(found)


def plan_of(num_examples: int, q: float, noise: float = 1.0) -> ExamplePlan:
    settings = ExampleDpConfig(
        enabled=True, noise_multiplier=Z * noise, clip_norm=CLIP_NORM, clipping="automatic", delta=DELTA
    )
    return ExamplePlan.create(
        settings,
        num_examples=num_examples,
        batch_size=q * num_examples,
        steps=(RUNS,),
        seed=num_examples,
        reproducible=True,
    )


def proven(q: float, noise: float = 1.0) -> float:
    """Return what the two worlds prove epsilon at DELTA to be at least (Clopper-Pearson)."""
    # Chosen before looking: where the victim's whole gradient lies above the mean of the world without it.
    threshold = (q * float(clipped_sum(0, 1, 2) @ direction()) / CLIP_NORM + 1) / Z
    inside, outside = (int((statistics(n, q, noise) > threshold).sum()) for n in (4, 3))
    alpha = (1 - CONFIDENCE) / 2
    low = stats.beta.ppf(alpha, inside, RUNS - inside + 1)
    high = stats.beta.ppf(1 - alpha, outside + 1, RUNS - outside)
    return float(np.log(max(low - DELTA, 1e-12) / high))


@pytest.mark.parametrize("q", [1.0, 0.5])
def test_one_example_more_is_told_no_better_than_accounted(q: float) -> None:
    assert proven(q) <= plan_of(4, q).epsilon(1)
    if q == 1.0:
        assert proven(q) > 0.1, "an attack that finds nothing proves nothing"


def test_half_the_noise_is_caught() -> None:
    assert proven(1.0, noise=0.5) > plan_of(4, 1.0).epsilon(1)


def test_noise_has_the_accounted_size() -> None:
    spread = statistics(3, 1.0).std(ddof=1)  # everybody is in each sample, so nothing else varies
    low, high = np.sqrt(stats.chi2.ppf([1e-3, 1 - 1e-3], RUNS - 1) / (RUNS - 1))
    assert low < spread < high
