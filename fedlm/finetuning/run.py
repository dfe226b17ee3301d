"""`fedlm finetune`: one model, one machine, private examples; a plan, a trainer for each phase, and a run folder.

The held-out examples are not protected: their scores are printed as they are. Nor is the number of training examples,
their largest class, or what time and memory tell of the samples.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlm.config.load import config_to_toml
from fedlm.config.paths import with_absolute_paths
from fedlm.config.schema import Config
from fedlm.errors import ConfigError, Interrupted
from fedlm.example_dp.plan import ExamplePlan
from fedlm.example_dp.trainer import DpTrainer, StepReport
from fedlm.finetuning.finetune_folder import FinetuneFolder, require_free
from fedlm.finetuning.workloads import Workload, open_workload
from fedlm.privacy.guarantee import to_dict
from fedlm.rounding import rounded_up, stamped

Listener = Callable[[dict[str, object]], None]
_EPSILON_SHARE = 0.05  # of the time at most, to tell epsilon meanwhile: a composition takes seconds
_NUM_LINES = 200  # of metrics.jsonl


@dataclass(frozen=True)
class FinetuneSummary:
    """A finished run in figures; None where a run has none, and an infinite epsilon is None too.

    Arguments:
        run_dir: The run folder.
        task: "language_model" or "classification".
        num_examples: n; counts as public.
        steps: Of all phases.
        accuracy_initial, accuracy: Of held-out texts, before and after; classification.
        perplexity_initial, perplexity: Of held-out targets, before and after; language models.
        bleu: Of greedy answers to held-out prompts, after.
        epsilon: Of the whole run at `delta`.
        delta: Of the guarantee.
        noise_multiplier: z of the last phase.
        privacy_statement: The guarantee in words.
        stamps: What must stand beside it.
        num_trained: Trained parameters of the last phase.
        update_bytes: Their size: what a release has to carry.
        peak_mb: Largest resident memory of the process so far, in MB; follows from the samples, so not private.
        seconds: Of the whole run; `seconds_per_step`: of its steps alone. Not private either.
    """

    run_dir: str
    task: str
    num_examples: int
    steps: int
    accuracy_initial: float | None
    accuracy: float | None
    perplexity_initial: float | None
    perplexity: float | None
    bleu: float | None
    epsilon: float | None
    delta: float
    noise_multiplier: float
    privacy_statement: str
    stamps: tuple[str, ...]
    num_trained: int
    update_bytes: int
    peak_mb: float
    seconds: float
    seconds_per_step: float


def finetune(config: Config, out: Path | None, listener: Listener) -> FinetuneSummary:
    """Fine-tune a model on private examples.

    Arguments:
        config: The experiment; its `finetune.train` names the examples.
        out: The run folder to make; None for a new one below runs/.
        listener: Receives progress events.

    Returns:
        The figures of the finished run.

    Raises:
        FedlmError: Any of `fedlm.errors`; what can be checked is checked before the first step.
        Interrupted: Ctrl-C or SIGTERM; there is no checkpoint.
    """
    started = time.monotonic()
    if not config.finetune.train:
        raise ConfigError("finetune.train names no file of examples; --set finetune.train=FILE")
    config = with_absolute_paths(config)
    path = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    require_free(path)
    workload = open_workload(config, listener)
    plan = make_plan(config, len(workload.examples))
    guarantee = plan.guarantee()
    folder = FinetuneFolder(path)
    folder.text("config.toml", config_to_toml(config))
    folder.json("plan.json", {**to_dict(guarantee), **plan.parameters()})
    for stamp in guarantee.warnings:
        listener({"event": "note", "text": stamp})
    progress = _Progress(plan, folder, listener)
    try:
        first = progress.scored(workload, "scoring the model as it is")
        trained = _train(workload, plan, progress)
        last = progress.scored(workload, "scoring the fine-tuned model")
        bleu = workload.bleu()
    except KeyboardInterrupt as error:
        raise Interrupted(progress.lost()) from error
    with folder.weights() as weights:
        workload.save(weights, guarantee)
    summary = _summary(workload, plan, progress, trained, (first, last), bleu, time.monotonic() - started)
    folder.json("summary.json", asdict(summary))
    return summary


def _summary(
    workload: Workload[Any],
    plan: ExamplePlan,
    progress: _Progress,
    trained: list[Tensor],
    scored: tuple[float | None, float | None],
    bleu: float | None,
    seconds: float,
) -> FinetuneSummary:
    scores = {"accuracy": (None, None), "perplexity": (None, None), workload.metric: scored}
    guarantee = plan.guarantee()
    return FinetuneSummary(
        run_dir=str(progress.path),
        task=workload.config.finetune.task,
        num_examples=plan.num_examples,
        steps=plan.num_steps,
        accuracy_initial=scores["accuracy"][0],
        accuracy=scores["accuracy"][1],
        perplexity_initial=scores["perplexity"][0],
        perplexity=scores["perplexity"][1],
        bleu=bleu,
        epsilon=guarantee.epsilon if math.isfinite(guarantee.epsilon) else None,
        delta=guarantee.delta,
        noise_multiplier=plan.phases[-1].noise_multiplier,
        privacy_statement=guarantee.statement,
        stamps=guarantee.warnings,
        num_trained=sum(tensor.numel() for tensor in trained),
        update_bytes=sum(tensor.numel() * tensor.element_size() for tensor in trained),
        peak_mb=_peak_mb(),
        seconds=seconds,
        seconds_per_step=progress.seconds / plan.num_steps,
    )


def make_plan(config: Config, num_examples: int) -> ExamplePlan:
    """Return the plan of a job: round(epochs n / batch_size) steps of each phase, at least one."""
    settings = config.finetune

    def steps(epochs: float) -> int:
        return max(1, round(epochs * num_examples / settings.batch_size))

    full = (steps(settings.full_epochs),) if settings.full_epochs else ()
    return ExamplePlan.create(
        settings.example_dp,
        num_examples=num_examples,
        batch_size=settings.batch_size,
        steps=(*full, steps(settings.epochs)),
        seed=config.seed,
        reproducible=config.privacy.reproducible_noise,
    )


def _train(workload: Workload[Any], plan: ExamplePlan, progress: _Progress) -> list[Tensor]:
    """Run every phase; returns what trained in the last one."""
    settings, trained = workload.config.finetune, list[Tensor]()
    for phase in range(len(plan.phases)):
        everything = phase + 1 < len(plan.phases)
        task = workload.task(everything=everything)
        rate = (everything and settings.full_learning_rate) or settings.learning_rate
        trainer = DpTrainer(
            task,
            workload.examples,
            plan,
            optimizer=settings.optimizer,
            learning_rate=rate,
            physical_batch_size=settings.physical_batch_size,
            engine=settings.example_dp.engine,
            phase=phase,
        )
        progress.phase(phase)
        for _ in range(trainer.steps_left):
            progress.stepped(trainer.step())
            workload.note_noise(task.trained, plan.noise_std(plan.phase_steps(phase)[0]), rate)
        trained = list(task.trained.values())
    return trained


class _Progress:
    """Tells the listener and metrics.jsonl how far the run is."""

    def __init__(self, plan: ExamplePlan, folder: FinetuneFolder, listener: Listener) -> None:
        self._plan, self._folder, self._listener = plan, folder, listener
        self._stamps = plan.guarantee().warnings
        self._done, self._phase, self._epsilon = 0, 0, 0.0
        self._last = self._epsilon_due = time.monotonic()
        self.seconds = 0.0

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._folder.path

    def phase(self, phase: int) -> None:
        """Note that a phase begins."""
        self._phase, self._last = phase, time.monotonic()

    def stepped(self, report: StepReport) -> None:
        """Note a step."""
        now, total = time.monotonic(), self._plan.num_steps
        seconds = now - self._last
        self._done, self.seconds = report.step, self.seconds + seconds
        ended = report.step == total
        if ended or now >= self._epsilon_due:
            self._epsilon = self._plan.epsilon(report.step)
            self._epsilon_due = now + (time.monotonic() - now) / _EPSILON_SHARE
        if ended or report.step % -(-total // _NUM_LINES) == 0 or report.step == 1:
            self._folder.metric(
                {"phase": self._phase, **asdict(report), "epsilon_at_least": self._epsilon, "stamps": self._stamps,
                 "seconds": self.seconds}
            )  # fmt: skip
        loss = report.non_private_loss
        self._listener(
            {
                "event": "finetune",
                "step": report.step,
                "steps": total,
                "non_private_loss": loss if math.isfinite(loss) else None,
                "epsilon": self._epsilon if math.isfinite(self._epsilon) else None,
                "stamps": self._stamps,
                "examples_per_second": self._plan.batch_size / seconds if seconds else None,
            }
        )
        self._last = time.monotonic()

    def scored(self, workload: Workload[Any], text: str) -> float | None:
        """Score the held-out examples, and note the result."""
        self._listener({"event": "stage", "text": text})
        score = workload.evaluate()
        if score is not None:
            self._folder.metric({"step": self._done, workload.metric: score})
        return score

    def lost(self) -> str:
        """Return what an interruption has cost."""
        if not self._done:
            return "interrupted before the first step; nothing was released"
        epsilon = self._plan.epsilon(self._done)
        figure = stamped(f"epsilon {rounded_up(epsilon)}", self._stamps)
        spent = f"; {figure} was spent on them" if math.isfinite(epsilon) else ""
        return (
            f"interrupted after step {self._done} of {self._plan.num_steps}; there is no checkpoint, the trained "
            f"weights are lost{spent}. {self._folder.path} keeps the metrics"
        )


def _peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
