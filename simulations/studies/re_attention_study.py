"""Re-Attention's effect on next-token quality under example-level DP, by how frequent the target is.

A tied transformer with a public base learns WikiText-2 with DP-Adam, all weights and tables of it (32 tokens are one
example), without Re-Attention and with it, for both readings of a row's noise
(`fedlm.models.re_attention.noise_levels`). Runs of one seed share starting weights, samples and noise, so differences
are taken by seed; the fixed seeds make every run NOT
PRIVATE: the corpus is public.

    python -m simulations.studies.re_attention_study wiki.train.tokens.xz wiki.valid.tokens.xz wiki.test.tokens.xz

trains the bases on the third text and prints a table. A run whose line is in the results file is not done again:
interrupt the study and start it again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlm.config import Config, load_config
from fedlm.config.schema import ExampleDpConfig
from fedlm.data.batching import Batch, sequences
from fedlm.data.examples import read_stream
from fedlm.data.vocabulary import Vocabulary
from fedlm.data.vocabulary_source import load_vocabulary
from fedlm.errors import FedlmError
from fedlm.example_dp.language import LanguageTask, Sequences
from fedlm.example_dp.plan import ExamplePlan
from fedlm.example_dp.trainer import DpTrainer, StepReport
from fedlm.models.factory import empty_model
from fedlm.models.re_attention.example_level import NoiseTracker
from fedlm.models.table_names import INPUT_TABLE, OUTPUT_BIAS
from fedlm.models.transformer import TransformerModel
from fedlm.models.weights import set_weights
from fedlm.pretraining.cache import has_base, load_base
from fedlm.pretraining.train import pretrain
from fedlm.randomness import seed_key
from fedlm.trainable.build import build_trainable
from simulations.studies.study import RESULTS, Line, append_result, difference, read_results, with_stamps

VARIANTS = ("off", "absolute", "per_frequency")
REFERENCE = "off"
NUM_DECILES = 10
OPTIMIZER = "adam"
PHYSICAL_BATCH = 64


@dataclass(frozen=True)
class Sizes:
    """What a run costs, and with the variant, epsilon and seed all that its figures depend on."""

    vocabulary: int = 10_000
    length: int = 32
    d_model: int = 64
    num_layers: int = 2
    num_heads: int = 2
    negatives: int = 512
    num_examples: int = 24_000
    num_test: int = 1_000
    batch_size: int = 256
    steps: int = 30
    learning_rate: float = 2e-3
    base_epochs: int = 6
    clip_norm: float = 0.1


@dataclass(frozen=True)
class ReAttentionJob:
    """One run."""

    variant: str
    epsilon: float
    seed: int
    corpus: str
    public: Path
    sizes: Sizes

    @property
    def key(self) -> str:
        """What its line is found by; files count by their names, wherever they lie."""
        named = asdict(self) | {"public": self.public.name}
        return sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return f"{self.variant}, epsilon {self.epsilon:g}, seed {self.seed}"


def main(argv: Sequence[str] | None = None) -> int:
    """Do the runs that are missing and print the table; returns the exit code."""
    arguments = _parser().parse_args(argv)
    sizes = Sizes(**dict(arguments.size))
    try:
        jobs = [
            ReAttentionJob(variant, epsilon, seed, arguments.train.name, arguments.public, sizes)
            for seed in arguments.seeds
            for epsilon in arguments.epsilons
            for variant in VARIANTS
        ]
        done = read_results(arguments.results)
        waiting = [job for job in jobs if job.key not in done]
        if waiting:
            _run_all(waiting, sizes, arguments)
        print("\n".join(table(jobs, read_results(arguments.results))))
    except FedlmError as error:
        print(f"re_attention_study: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run_all(jobs: Sequence[ReAttentionJob], sizes: Sizes, arguments: argparse.Namespace) -> None:
    vocabulary = load_vocabulary(settings(jobs[0]))
    train = _windows(arguments.train, vocabulary, sizes.length, sizes.num_examples)
    test = _windows(arguments.test, vocabulary, sizes.length, sizes.num_test)
    for left, job in zip(range(len(jobs) - 1, -1, -1), jobs, strict=True):
        line = run(job, vocabulary, train, test)
        append_result(arguments.results, line)
        print(f"{job}: perplexity {line['perplexity']:.1f}, {line['seconds']:.0f} s, {left} to go", file=sys.stderr)


def settings(job: ReAttentionJob) -> Config:
    """Return the config of a run's model and loss."""
    sizes = job.sizes
    return load_config(
        None,
        [
            f"seed={job.seed}",
            f"data.sequence_length={sizes.length}",
            f"vocabulary.size={sizes.vocabulary}",
            f"model.d_model={sizes.d_model}",
            f"model.num_layers={sizes.num_layers}",
            f"model.num_heads={sizes.num_heads}",
            f"model.re_attention={job.variant}",
            f"pretrain.corpus={json.dumps(str(job.public.resolve()))}",
            f"pretrain.epochs={sizes.base_epochs}",
            "trainable.lora.rank=0",
            "trainable.dense=['*']",
            "trainable.embedding_rows.count=0",
            "loss.kind=sampled_softmax",
            f"loss.negatives={sizes.negatives}",
        ],
    )


def run(job: ReAttentionJob, vocabulary: Vocabulary, train: Batch, test: Batch) -> dict[str, Any]:
    """Train and score once; returns the line."""
    start, sizes, config = time.monotonic(), job.sizes, settings(job)
    frequencies = vocabulary.frequencies
    model = _base(replace(config, model=replace(config.model, re_attention="off")), vocabulary)
    model.re_attention = job.variant != REFERENCE
    base = score(model, test, frequencies)["perplexity"]
    task = LanguageTask(
        build_trainable(model, config),
        config,
        frequencies,
        tables=frozenset({INPUT_TABLE, OUTPUT_BIAS}),
        negatives_key=seed_key(job.seed),
    )
    examples = Sequences(train)
    plan = ExamplePlan.create(
        ExampleDpConfig(enabled=True, epsilon=job.epsilon, clip_norm=sizes.clip_norm),
        num_examples=len(examples),
        batch_size=sizes.batch_size,
        steps=(sizes.steps,),
        seed=job.seed,
        reproducible=True,
    )
    trainer = DpTrainer(
        task,
        examples,
        plan,
        optimizer=OPTIMIZER,
        learning_rate=sizes.learning_rate,
        physical_batch_size=PHYSICAL_BATCH,
    )
    kind = "absolute" if job.variant == REFERENCE else job.variant  # without Re-Attention nobody asks
    tracker = NoiseTracker(model, frequencies, num_tokens=sizes.length, batch_size=sizes.batch_size, kind=kind)

    def after_step(report: StepReport) -> None:
        tracker.after_step(
            task.trained,
            noise_std=plan.noise_std(report.step - 1),
            learning_rate=sizes.learning_rate,
            optimizer=OPTIMIZER,
        )

    trainer.train(after_step)
    named = {"variant": job.variant, "epsilon_target": job.epsilon, "seed": job.seed, "corpus": job.corpus}
    figures = {"perplexity_initial": base, **score(model, test, frequencies)}
    spent = {
        "epsilon": plan.epsilon(sizes.steps),
        "stamps": plan.guarantee().warnings,
        "seconds": time.monotonic() - start,
    }
    return {"key": job.key, **named, **figures, **spent}


def _base(config: Config, vocabulary: Vocabulary) -> TransformerModel:
    """Return the public base, trained if it is not there yet."""
    if not has_base(config):
        pretrain(config, vocabulary, lambda event: None)
    model = empty_model(config, vocabulary.size)
    set_weights(model, load_base(config), copy=True)
    assert isinstance(model, TransformerModel)
    return model


@torch.no_grad()
def score(model: TransformerModel, test: Batch, frequencies: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    """Return perplexity and accuracies, overall and by decile: a tenth of the targets each, the most frequent first."""
    model.eval()
    parts = [
        _score_part(model, *(torch.from_numpy(a[i : i + 32]) for a in (test.inputs, test.targets, test.mask)))
        for i in range(0, len(test.inputs), 32)
    ]
    targets, nll, ranks = (torch.cat([part[i] for part in parts]).numpy() for i in range(3))  # (N,) each
    order = np.argsort(-frequencies[targets], kind="stable")
    deciles = np.array_split(order, NUM_DECILES)
    return {
        "perplexity": float(np.exp(nll.mean())),
        "accuracy_at_1": float((ranks < 1).mean()),
        "accuracy_at_10": float((ranks < 10).mean()),
        "perplexity_deciles": [float(np.exp(nll[d].mean())) for d in deciles],
        "accuracy_at_1_deciles": [float((ranks[d] < 1).mean()) for d in deciles],
        "accuracy_at_10_deciles": [float((ranks[d] < 10).mean()) for d in deciles],
    }


def _score_part(
    model: TransformerModel, inputs: Tensor, targets: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return targets, negative log likelihoods and ranks from 0, (N,) each."""
    hidden = model.hidden(inputs, mask)[mask]  # (N, D)
    assert model.output_bias is not None
    logits = hidden @ model.output_table.T + model.output_bias  # (N, V)
    wanted = targets[mask]  # (N,)
    scores = logits.gather(1, wanted[:, None])  # (N, 1)
    return wanted, logits.logsumexp(1) - scores[:, 0], (logits > scores).sum(1)


def table(jobs: Sequence[ReAttentionJob], lines: dict[str, Line]) -> Iterator[str]:
    """Yield a Markdown table: a row for each variant and epsilon, differences against attention as it is."""
    yield "| epsilon | variant | perplexity | against off | @1 % | @10 % | @10 %, rarest half | against off |"
    yield "|---|---|---|---|---|---|---|---|"
    for epsilon in dict.fromkeys(job.epsilon for job in jobs):
        found = {
            variant: {
                job.seed: lines[job.key]
                for job in jobs
                if (job.variant, job.epsilon) == (variant, epsilon) and job.key in lines
            }
            for variant in VARIANTS
        }
        for variant, by_seed in found.items():
            if by_seed:
                yield _row(epsilon, variant, by_seed, found[REFERENCE])


def _row(epsilon: float, variant: str, these: dict[int, Line], reference: dict[int, Line]) -> str:
    perplexity, reference_perplexity = ({s: line["perplexity"] for s, line in x.items()} for x in (these, reference))
    rare, reference_rare = ({s: _rare(line) for s, line in x.items()} for x in (these, reference))
    is_reference = variant == REFERENCE
    cells = (
        with_stamps(f"{epsilon:g}", these.values()),
        variant,
        f"{mean(perplexity.values()):.1f}",
        "-" if is_reference else difference(perplexity, reference_perplexity, 2),
        f"{mean(100 * line['accuracy_at_1'] for line in these.values()):.2f}",
        f"{mean(100 * line['accuracy_at_10'] for line in these.values()):.2f}",
        f"{mean(rare.values()):.3f}",
        "-" if is_reference else difference(rare, reference_rare, 3),
    )
    return f"| {' | '.join(cells)} |"


def _rare(line: Line) -> float:
    """Return the percentage of the rarer half of targets that are among the first ten."""
    deciles: list[float] = line["accuracy_at_10_deciles"]
    return 100 * mean(deciles[NUM_DECILES // 2 :])


def _windows(file: Path, vocabulary: Vocabulary, length: int, most: int) -> Batch:
    """Return the first `most` windows of a running text."""
    lines, enough = [], most * length + 1
    for text in read_stream(file):
        lines.append(vocabulary.encode(text))
        enough -= len(lines[-1])
        if enough <= 0:
            break
    windows = sequences(np.concatenate(lines), length)
    return Batch(windows.inputs[:most], windows.targets[:most], windows.mask[:most])


def _size(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    known = asdict(Sizes())
    if name not in known:
        raise argparse.ArgumentTypeError(f"{name!r} is no size; choose from {', '.join(known)}")
    return name, type(known[name])(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="re_attention_study", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("train", type=Path, help="running text, .txt or .tokens, also .xz")
    parser.add_argument("test", type=Path, help="held-out text of the same form")
    parser.add_argument("public", type=Path, help="public text of the same form, for the base")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[5.0, 8.0], metavar="E")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="S")
    parser.add_argument("--size", type=_size, nargs="+", default=[], metavar="NAME=VALUE", help="other sizes")
    parser.add_argument("--results", type=Path, default=RESULTS / "re_attention_study.jsonl", metavar="FILE")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
