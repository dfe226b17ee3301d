"""Perplexity at equal epsilon, measured: mechanisms and noise allocations on one corpus of real users.

Every variant changes the recipe `privacy_study.toml` in the keys of `VARIANTS` alone. A run is a process of its own
(`fedlm simulate`); its figures become one line of the results file, and a run whose line is there is not done again:
interrupt the study and start it again. A line names its config's hash, so an edited recipe leaves old lines behind.

    python -m simulations.recipes.privacy_study ubuntu_irc.users.jsonl.xz

prints a table. Runs of one seed start from one base and are scored on the same users: differences are taken by seed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fedlm.config import Config, config_hash, load_config
from fedlm.errors import DataError, FedlmError

RECIPE = Path(__file__).with_name("privacy_study.toml")
RESULTS = Path(__file__).parent / "results" / "privacy_study.jsonl"
REFERENCE = "gaussian"
"""The variant that the others are compared with: independent noise, the same on every coordinate."""

NOISELESS = "noiseless"
"""Clipped as the others are, with noise too small to matter; its epsilon is none of the study's."""

VARIANTS: dict[str, tuple[str, ...]] = {
    NOISELESS: ("privacy.noise_multiplier=1e-4",),
    REFERENCE: (),
    "gaussian_public": ("privacy.allocation=public",),
    "gaussian_adaptive": ("privacy.allocation=adaptive",),
    "gaussian_published": ("privacy.allocation=published",),
    "blt": ("privacy.mechanism=blt",),
    "blt_public": ("privacy.mechanism=blt", "privacy.allocation=public"),
    "banded": ("privacy.mechanism=banded",),
    "banded_public": ("privacy.mechanism=banded", "privacy.allocation=public"),
}
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One run of the study.

    Arguments:
        variant: A name of `VARIANTS`.
        epsilon: What the noise is calibrated to; 0: nothing.
        seed: Of the run.
        corpus: The users file.
    """

    variant: str
    epsilon: float
    seed: int
    corpus: Path

    @property
    def overrides(self) -> list[str]:
        """What `--set` gets, the corpus aside."""
        return [f"seed={self.seed}", f"privacy.epsilon={self.epsilon:g}", *VARIANTS[self.variant]]

    @property
    def arguments(self) -> list[str]:
        """The words of a verb that takes a config."""
        corpus = f"data.corpus={json.dumps(str(self.corpus))}"  # as a TOML string: a name like 2024.jsonl stays text
        return [str(RECIPE), *(word for text in (corpus, *self.overrides) for word in ("--set", text))]

    @cached_property
    def key(self) -> str:
        """The hash of the config; the corpus counts by its name, wherever it lies.

        Raises:
            ConfigError: The variant is no valid config.
        """
        config: Config = load_config(RECIPE, self.overrides)
        return config_hash(replace(config, data=replace(config.data, corpus=self.corpus.name)))

    def __str__(self) -> str:
        return f"{self.variant}, epsilon {self.epsilon:g}, seed {self.seed}"


def main(argv: Sequence[str] | None = None) -> int:
    """Do the runs that are missing and print the table; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        jobs = list(grid(arguments.corpus, arguments.epsilons, arguments.seeds, arguments.only))
        lines = read_results(arguments.results)
        waiting = sorted((job for job in jobs if job.key not in lines), key=lambda job: job.seed)
        failures = run_all(waiting, arguments.results, arguments.jobs, arguments.deadline)
        print("\n".join(table(jobs, read_results(arguments.results))))
    except FedlmError as error:
        print(f"privacy_study: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("privacy_study: interrupted; start it again to go on", file=sys.stderr)
        return 130
    return 1 if failures else 0


def grid(corpus: Path, epsilons: Iterable[float], seeds: Sequence[int], only: Sequence[str]) -> Iterator[Job]:
    """Yield the runs in the order of the table; the noiseless one once a seed."""
    names = [name for name in VARIANTS if not only or name in only]
    for epsilon in (0.0, *epsilons):
        for name in names:
            if (name == NOISELESS) == (epsilon == 0):
                yield from (Job(name, epsilon, seed, corpus) for seed in seeds)


def run_all(jobs: Sequence[Job], results: Path, num_jobs: int, deadline_s: float) -> int:
    """Do all runs, `num_jobs` at a time, and store each as it ends; returns how many failed."""
    failures = 0
    for job in {job.seed: job for job in jobs}.values():
        _call("pretrain", [*job.arguments, "--quiet"], deadline_s)  # once a seed, before runs would race for it
    with ThreadPoolExecutor(num_jobs) as pool:
        running: dict[Future[dict[str, Any]], Job] = {pool.submit(run, job, deadline_s): job for job in jobs}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    failures += not _store(running.pop(future), future, results, len(running))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failures


def run(job: Job, deadline_s: float) -> dict[str, Any]:
    """Do one run in a process of its own; returns its line.

    Raises:
        FedlmError: It failed, or took longer than `deadline_s`.
    """
    with tempfile.TemporaryDirectory(prefix="privacy-study-") as folder:
        words = [*job.arguments, "--out", str(Path(folder) / "run"), "--json", "--quiet"]
        figures = json.loads(_call("simulate", words, deadline_s))
    del figures["run_dir"]  # gone by now
    named = {"variant": job.variant, "epsilon_target": job.epsilon, "seed": job.seed, "corpus": job.corpus.name}
    return {"key": job.key, **named, **figures}


def read_results(file: Path) -> dict[str, Line]:
    """Return the lines of a results file by key; none if it is absent.

    Raises:
        DataError: A line is no result.
    """
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    found: dict[str, Line] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            parsed = json.loads(line)
            found[parsed["key"]] = parsed
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}, line {number} is no result ({error}); delete the line") from None
    return found


def append_result(file: Path, line: Line) -> None:
    """Append one line in one write: two studies may share a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(line, allow_nan=False) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def table(jobs: Iterable[Job], lines: Mapping[str, Line]) -> Iterator[str]:
    """Yield a Markdown table: a row for each variant and epsilon that has results."""
    rows: dict[tuple[float, str], dict[int, Line]] = {}
    for job in jobs:
        if job.key in lines:
            rows.setdefault((job.epsilon, job.variant), {})[job.seed] = lines[job.key]
    yield "| target | variant | true epsilon | perplexity | each seed | base | against gaussian |"
    yield "|---|---|---|---|---|---|---|"
    for (epsilon, variant), by_seed in rows.items():
        found = [_number(line, "perplexity") for line in by_seed.values()]
        base = mean(_number(line, "perplexity_initial") for line in by_seed.values())
        cells = (
            "none" if variant == NOISELESS else f"{epsilon:g}",
            variant,
            "-" if variant == NOISELESS else f"{max(_number(line, 'epsilon') for line in by_seed.values()):.3g}",
            f"{mean(found):.1f}",
            ", ".join(f"{value:.1f}" for value in found),
            f"{base:.1f}",
            "-" if variant == REFERENCE else _difference(by_seed, rows.get((epsilon, REFERENCE), {})),
        )
        yield f"| {' | '.join(cells)} |"


def _difference(these: Mapping[int, Line], reference: Mapping[int, Line]) -> str:
    """Return the mean difference over the seeds that both have, with its standard error."""
    seeds = these.keys() & reference.keys()
    found = [_number(these[seed], "perplexity") - _number(reference[seed], "perplexity") for seed in sorted(seeds)]
    if len(found) < 2:
        return f"{found[0]:+.1f}" if found else "-"
    return f"{mean(found):+.1f} ± {stdev(found) / math.sqrt(len(found)):.1f}"


def _number(line: Line, name: str) -> float:
    """Return a figure; JSON has null for infinity."""
    return math.inf if line[name] is None else float(line[name])


def _store(job: Job, future: Future[dict[str, Any]], results: Path, num_left: int) -> bool:
    """Store the line of a run that ended, or say why it has none."""
    try:
        line = future.result()
    except FedlmError as error:
        print(f"{job}: {error}", file=sys.stderr)
        return False
    append_result(results, line)
    perplexity, seconds = _number(line, "perplexity"), _number(line, "seconds")
    print(f"{job}: perplexity {perplexity:.1f}, {seconds:.0f} s, {num_left} to go", file=sys.stderr)
    return True


def _call(verb: str, words: Sequence[str], deadline_s: float) -> str:
    """Return what `fedlm VERB WORDS` prints; one thread, since runs stand side by side."""
    command = [sys.executable, "-m", "fedlm.cli", verb, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, env=environment)
    except subprocess.TimeoutExpired:
        raise FedlmError(f"`fedlm {verb}` took longer than {deadline_s:g} s; raise --deadline") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FedlmError(f"`fedlm {verb}` ended with exit code {done.returncode}: {last}")
    return done.stdout


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="privacy_study", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("corpus", type=lambda text: Path(text).resolve(), help="a users.jsonl[.xz] file")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[2.0, 8.0], metavar="E")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="S")
    parser.add_argument("--only", nargs="+", default=[], choices=sorted(VARIANTS), metavar="NAME", help="variants")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--deadline", type=float, default=600.0, metavar="S", help="seconds that a run may take")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
