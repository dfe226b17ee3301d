"""DP-SGD: sample, clip and sum in physical batches, release once a step, move the weights along the release.

    trainer = DpTrainer(task, examples, plan, optimizer="adam", learning_rate=1e-3, physical_batch_size=32)
    trainer.train(lambda report: print(report.step, plan.epsilon(report.step)))

Several phases (X+BiTFiT: all weights first, then biases) are several trainers, one after the other, of one plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedlm.errors import BudgetExceededError, ConfigError
from fedlm.example_dp.clip_rule import ClipRule
from fedlm.example_dp.engine import ClippedGradients, PerExampleEngine
from fedlm.example_dp.independence import check_independence
from fedlm.example_dp.plan import ExamplePlan
from fedlm.example_dp.task import BatchT, Examples, Task
from fedlm.ranges import require_count, require_number

ENGINES = ("fedlm", "opacus")
ContravariantBatch = TypeVar("ContravariantBatch", contravariant=True)


class ClippingEngine(Protocol[ContravariantBatch]):
    """Computes clipped gradients."""

    def clipped(self, batch: ContravariantBatch, rule: ClipRule) -> ClippedGradients:
        """Return the clipped sums of one physical batch."""
        ...


@dataclass(frozen=True)
class StepReport:
    """What happened in a step. Fields named non-private are not covered by the guarantee: keep them with the data.

    Arguments:
        step: Steps done so far, over all phases, this one included.
        release_norm: L2 norm of the noised mean gradient.
        noise_norm: What noise alone would have, z C sqrt(P) / (q n); a public number.
        non_private_num_sampled: Realised batch size.
        non_private_loss: Mean over the sampled examples with a finite loss; nan without any.
        non_private_clipped_fraction: Of the sampled examples, whose gradient was longer than the clip norm.
        non_private_num_rejected: Sampled examples whose gradient was not finite; they counted as zero.
    """

    step: int
    release_norm: float
    noise_norm: float
    non_private_num_sampled: int
    non_private_loss: float
    non_private_clipped_fraction: float
    non_private_num_rejected: int


@dataclass
class _Totals:
    """The sums of the physical batches so far."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    num_clipped: int = 0
    num_rejected: int = 0

    def add(self, part: ClippedGradients) -> None:
        """Add a physical batch, whose tensors are the engine's no longer."""
        if self.sums:
            for name, value in part.sums.items():
                self.sums[name] += value
        else:
            self.sums = dict(part.sums)
        self.losses.append(part.losses.detach().double().cpu())
        self.num_clipped += part.num_clipped
        self.num_rejected += part.num_rejected

    def report(self, release: dict[str, Tensor], *, step: int, noise_std: float, num_sampled: int) -> StepReport:
        """Return what is worth telling."""
        losses = torch.cat(self.losses) if self.losses else torch.zeros(0)
        num_trained = sum(value.numel() for value in release.values())
        return StepReport(
            step=step,
            release_norm=math.sqrt(sum(float(torch.linalg.vector_norm(value)) ** 2 for value in release.values())),
            noise_norm=noise_std * math.sqrt(num_trained),
            non_private_num_sampled=num_sampled,
            non_private_loss=float(losses[losses.isfinite()].mean()),
            non_private_clipped_fraction=self.num_clipped / max(1, num_sampled),
            non_private_num_rejected=self.num_rejected,
        )


class DpTrainer(Generic[BatchT]):
    """Trains one phase of a plan; the model ends where the last release has moved it.

    Arguments:
        task: What trains; its tensors are moved in place.
        examples: The private data, as many as the plan has.
        plan: Sampler, clip rule, noise and accounting; shared by the trainers of all phases.
        optimizer: "adam" or "sgd", of the noised gradients.
        learning_rate: Of the optimizer.
        physical_batch_size: Examples in memory at a time; changes a release by rounding alone.
        engine: "fedlm", or "opacus" for its per-sample hooks.
        phase: Whose steps these are, counted from 0.

    Guarantee:
        The plan's, for the model after every step and for the public fields of the reports, if each example's loss
        depends on that example alone. The first sample of at least two examples is checked for that.

    Edge cases:
        An empty sample releases noise and moves the weights. A step that fails before its release can be made again,
        with the same sample; one that fails after it is spent.

    Raises:
        ConfigError: What the engine refuses, or data of another size than the plan's.
    """

    def __init__(
        self,
        task: Task[BatchT],
        examples: Examples[BatchT],
        plan: ExamplePlan,
        *,
        optimizer: str,
        learning_rate: float,
        physical_batch_size: int,
        engine: str = "fedlm",
        phase: int = 0,
    ) -> None:
        if len(examples) != plan.num_examples:
            raise ConfigError(
                f"the plan is for {plan.num_examples:,} examples, the data has {len(examples):,}; make the plan with it"
            )
        if not task.trained:
            raise ConfigError("nothing trains; let the task have trained tensors")
        require_count("physical_batch_size", physical_batch_size, low=1)
        self._task, self._examples, self._plan = task, examples, plan
        self._engine = _engine(engine, task)
        self._optimizer = ReleaseOptimizer(optimizer, task.trained, learning_rate)
        self._physical = physical_batch_size
        self._steps = plan.phase_steps(phase)
        self._next = self._steps.start
        self._is_checked = False

    @property
    def steps_left(self) -> int:
        """Steps of this phase that are still to be made."""
        return self._steps.stop - self._next

    def train(self, listener: Callable[[StepReport], None] | None = None) -> None:
        """Make all steps that are left.

        Arguments:
            listener: Is told of each step.
        """
        while self.steps_left:
            report = self.step()
            if listener is not None:
                listener(report)

    def step(self) -> StepReport:
        """Make one step.

        Raises:
            BudgetExceededError: No step of this phase is left.
            ConfigError: A loss that depends on other examples, found at the first sample of two.
        """
        if not self.steps_left:
            raise BudgetExceededError(f"all {len(self._steps):,} steps of this phase were made; plan more at the start")
        step, indices = self._next, self._plan.sample(self._next)
        with _training_mode(self._task.model), _own_draws(self._task, self._plan.step_secret(step)):
            totals = self._clipped(indices, step)
        release = self._plan.release(totals.sums, step)
        self._next += 1
        self._optimizer.step(release)
        std = self._plan.noise_std(step)
        return totals.report(release, step=self._next, noise_std=std, num_sampled=len(indices))

    def _clipped(self, indices: npt.NDArray[np.int64], step: int) -> _Totals:
        """Return the clipped sums of a logical batch, zeros if it is empty."""
        self._check_once(indices, step)
        self._task.begin_step(step, self._plan.step_secret(step))
        totals = _Totals()
        # A batch is padded to its longest example, so the similar go together.
        indices = indices[np.argsort(-self._examples.lengths(indices), kind="stable")]
        for start in range(0, len(indices), self._physical):
            batch = self._examples.batch(indices[start : start + self._physical])
            totals.add(self._engine.clipped(batch, self._plan.rule))
        if not len(indices):
            totals.sums = {name: torch.zeros_like(tensor.detach()) for name, tensor in self._task.trained.items()}
        # A tensor that got noise only in some steps would tell in which of them it had a gradient.
        assert totals.sums.keys() == self._task.trained.keys(), "the engine left out tensors that train"
        return totals

    def _check_once(self, indices: npt.NDArray[np.int64], step: int) -> None:
        """Check the task on the first sample that can show whether examples depend on each other."""
        if self._is_checked or len(indices) < 2:
            return
        self._task.begin_step(step, self._plan.step_secret(step))
        check_independence(self._task, self._examples, indices)
        self._is_checked = True


def _engine(name: str, task: Task[BatchT]) -> ClippingEngine[BatchT]:
    if name == "fedlm":
        return PerExampleEngine(task)
    if name == "opacus":
        from fedlm.example_dp.opacus_engine import OpacusEngine

        return OpacusEngine(task)
    raise ConfigError(f"engine = {name!r} is unknown; choose from {', '.join(ENGINES)}")


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into training mode for a while, except batch norms that were set to use frozen statistics."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module, was_training in modes.items():
        if isinstance(module, _BatchNorm):
            module.train(was_training)
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


@contextmanager
def _own_draws(task: Task[BatchT], secret: bytes) -> Iterator[None]:
    """Let torch's global generator, from which dropout of pretrained models draws, follow from a step's secret."""
    devices = sorted({tensor.device.index for tensor in task.trained.values() if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(secret[:8], "little"))
        yield


KINDS = ("adam", "sgd")


class ReleaseOptimizer:
    """Steps trained tensors along releases; plain tensors too, for it never needs their own gradients.

    Arguments:
        kind: "adam" or "sgd", torch's with their defaults (no momentum, no weight decay).
        trained: By name; written in place, their memory must stay where it is.
        learning_rate: Above 0.

    Raises:
        ConfigError: Another kind, or a learning rate out of range.
    """

    def __init__(self, kind: str, trained: Mapping[str, Tensor], learning_rate: float) -> None:
        require_number("learning_rate", learning_rate, above=0)
        self._leaves = {name: tensor.detach() for name, tensor in trained.items()}  # the same memory, no graph
        leaves = list(self._leaves.values())
        self._optimizer: torch.optim.Optimizer
        if kind == "adam":
            self._optimizer = torch.optim.Adam(leaves, lr=learning_rate)
        elif kind == "sgd":
            self._optimizer = torch.optim.SGD(leaves, lr=learning_rate)
        else:
            raise ConfigError(f"optimizer = {kind!r} is unknown; choose from {', '.join(KINDS)}")

    def step(self, release: Mapping[str, Tensor]) -> None:
        """Move every trained tensor; `release` has a gradient for each of them."""
        for name, leaf in self._leaves.items():
            leaf.grad = release[name].to(leaf.dtype)
        self._optimizer.step()
        for leaf in self._leaves.values():
            leaf.grad = None
