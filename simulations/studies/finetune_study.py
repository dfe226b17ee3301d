"""What example-level DP costs real models, by what trains: all weights, LoRA, or biases alone (DP-BiTFiT).

MiniLM learns the sentiment of SST-2's sentences, a small transformer of ours with a public WikiText-2 base learns E2E's
restaurant descriptions, each at epsilon 3 and 8 and without DP. Variants change the recipes `sst2.toml` and `e2e.toml`
in the keys below alone; learning rates were chosen on seed 1 at epsilon 8.

    python -m simulations.studies.finetune_study DATA

prints a table; DATA holds the folders sst2, e2e and wikitext2. Interrupt it and start it again (`study.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar

from fedlm.config import load_config
from fedlm.errors import FedlmError
from simulations.studies import study
from simulations.studies.study import Line, call, number, read_results, run_all, settings_key, with_stamps

FILE = study.RESULTS / "finetune_study.jsonl"
FILES: dict[str, dict[str, str]] = {
    "sst2": {"finetune.train": "sst2/train.tsv.xz", "finetune.test": "sst2/dev.tsv.xz"},
    "e2e": {
        "finetune.train": "e2e/trainset.csv.xz",
        "finetune.test": "e2e/devset.csv.xz",
        "pretrain.corpus": "wikitext2/wiki.train.tokens.xz",
    },
}
_ALL = ("trainable.dense=['*']", "trainable.lora.rank=0", "finetune.embeddings=true", "trainable.bias=false")
_LORA = ("trainable.lora.rank=8", "trainable.bias=false")
_BIASES = ("trainable.bias=true", "trainable.lora.rank=0")
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "sst2": {
        "full": (*_ALL, "finetune.learning_rate=5e-4"),
        "lora": (*_LORA, "finetune.learning_rate=5e-3"),
        "bitfit": (*_BIASES, "finetune.learning_rate=1e-2"),
    },
    "e2e": {
        "full": (*_ALL, "finetune.learning_rate=1e-3"),
        "lora": (*_LORA, "finetune.learning_rate=5e-3"),
        "bitfit": (*_BIASES, "finetune.learning_rate=1e-2"),
    },
}
# Scaled down to what two cores do in an hour: 40 steps of 256 of 67,349 texts, 25 of 256 of 42,061 descriptions.
SIZES: dict[str, tuple[str, ...]] = {
    "sst2": ("finetune.epochs=0.152", "finetune.batch_size=256"),
    "e2e": (
        "finetune.epochs=0.152",
        "finetune.batch_size=256",
        "vocabulary.size=10000",
        "model.d_model=128",
        "model.num_layers=2",
        "pretrain.epochs=1",
    ),
}
METRICS = {"sst2": ("accuracy",), "e2e": ("perplexity", "bleu")}
NON_PRIVATE = 0.0


@dataclass(frozen=True)
class FinetuneJob:
    """One run of the study.

    Arguments:
        task: "sst2" or "e2e".
        variant: A name of `VARIANTS`.
        epsilon: What the noise is calibrated to; 0: without DP.
        seed: Of the run.
        data: The folder of the corpora.
    """

    verb: ClassVar[str] = "finetune"
    task: str
    variant: str
    epsilon: float
    seed: int
    data: Path

    @property
    def overrides(self) -> list[str]:
        """What `--set` gets, the files aside."""
        privacy = (
            (f"finetune.example_dp.epsilon={self.epsilon:g}",)
            if self.epsilon
            else ("finetune.example_dp.enabled=false", "finetune.example_dp.epsilon=0")
        )
        return [f"seed={self.seed}", *SIZES[self.task], *VARIANTS[self.task][self.variant], *privacy]

    @property
    def arguments(self) -> list[str]:
        """The words after the verb."""
        files = [f"{key}={json.dumps(str(self.data / name))}" for key, name in FILES[self.task].items()]
        return [str(self._recipe), *(word for text in (*files, *self.overrides) for word in ("--set", text))]

    @cached_property
    def key(self) -> str:
        """The hash of the settings; the corpora count by their names, wherever they lie.

        Raises:
            ConfigError: The variant is no valid config.
        """
        names = [f"{key}={json.dumps(name)}" for key, name in FILES[self.task].items()]
        return settings_key(load_config(self._recipe, [*self.overrides, *names]))

    @property
    def named(self) -> dict[str, Any]:
        """What the line says beside the figures."""
        return {"task": self.task, "variant": self.variant, "epsilon_target": self.epsilon, "seed": self.seed}

    @property
    def _recipe(self) -> Path:
        return Path(__file__).parents[1] / "recipes" / f"{self.task}.toml"

    def __str__(self) -> str:
        return f"{self.task}, {self.variant}, epsilon {self.epsilon:g}, seed {self.seed}"


def main(argv: Sequence[str] | None = None) -> int:
    """Do the runs that are missing and print the table; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        jobs = list(grid(arguments))
        lines = read_results(arguments.results)
        waiting = sorted((job for job in jobs if job.key not in lines), key=lambda job: job.seed)
        for job in {job.seed: job for job in waiting if job.task == "e2e"}.values():
            call("pretrain", [*job.arguments, "--quiet"], arguments.deadline)  # once a seed, before runs race for it
        failures = run_all(waiting, arguments.results, arguments.jobs, arguments.deadline)
        print("\n".join(table(jobs, read_results(arguments.results))))
    except FedlmError as error:
        print(f"finetune_study: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("finetune_study: interrupted; start it again to go on", file=sys.stderr)
        return 130
    return 1 if failures else 0


def grid(arguments: argparse.Namespace) -> Iterator[FinetuneJob]:
    """Yield the runs in the order of the table."""
    for task in arguments.tasks:
        for variant in arguments.variants:
            for epsilon in arguments.epsilons:
                yield from (FinetuneJob(task, variant, epsilon, seed, arguments.data) for seed in arguments.seeds)


def table(jobs: Sequence[FinetuneJob], lines: Mapping[str, Line]) -> Iterator[str]:
    """Yield a Markdown table: a row for each task, variant and epsilon that has results."""
    rows: dict[tuple[str, str, float], list[Line]] = {}
    for job in jobs:
        if job.key in lines:
            rows.setdefault((job.task, job.variant, job.epsilon), []).append(lines[job.key])
    yield "| task | trains | parameters | epsilon | metric | before | after | seeds | seconds a step |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for (task, variant, epsilon), found in rows.items():
        for metric in METRICS[task]:
            values = [number(line, metric) for line in found if line.get(metric) is not None]
            if not values:
                continue
            before = [number(line, f"{metric}_initial") for line in found if f"{metric}_initial" in line]
            cells = (
                task,
                variant,
                f"{found[0]['num_trained']:,}",
                with_stamps(f"{epsilon:g}", found) if epsilon else "not private",
                metric,
                f"{mean(before):.4g}" if before else "-",
                f"{mean(values):.4g}" + (f" ± {stdev(values) / len(values) ** 0.5:.2g}" if len(values) > 1 else ""),
                f"{len(values)}",
                f"{mean(number(line, 'seconds_per_step') for line in found):.2f}",
            )
            yield f"| {' | '.join(cells)} |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="finetune_study", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=lambda text: Path(text).resolve(), help="the folder of sst2, e2e and wikitext2")
    parser.add_argument("--tasks", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS["e2e"]), choices=list(VARIANTS["e2e"]))
    parser.add_argument("--epsilons", type=float, nargs="+", default=[NON_PRIVATE, 8.0, 3.0], metavar="E")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="S")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--deadline", type=float, default=3_600.0, metavar="S", help="seconds that a run may take")
    parser.add_argument("--results", type=Path, default=FILE, metavar="FILE")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
