"""Perplexity at equal epsilon, measured: mechanisms and noise allocations on one corpus of real users.

Every variant changes the recipe `privacy_study.toml` in the keys of `VARIANTS` alone (`study.py`: runs and results).

    python -m simulations.studies.privacy_study ubuntu_irc.users.jsonl.xz

prints a table. Runs of one seed start from one base and are scored on the same users: differences are taken by seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

from fedlm.config import load_config
from fedlm.errors import FedlmError
from simulations.studies import study
from simulations.studies.study import Line, call, difference, number, read_results, run_all, settings_key, with_stamps

RECIPE = Path(__file__).parents[1] / "recipes" / "privacy_study.toml"
RESULTS = study.RESULTS / "privacy_study.jsonl"
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


@dataclass(frozen=True)
class PrivacyJob:
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

    verb: ClassVar[str] = "simulate"

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
        config = load_config(RECIPE, self.overrides)
        return settings_key(replace(config, data=replace(config.data, corpus=self.corpus.name)))

    @property
    def named(self) -> dict[str, Any]:
        """What the line says beside the figures."""
        names = {"variant": self.variant, "epsilon_target": self.epsilon, "seed": self.seed}
        return {**names, "corpus": self.corpus.name}

    def __str__(self) -> str:
        return f"{self.variant}, epsilon {self.epsilon:g}, seed {self.seed}"


def main(argv: Sequence[str] | None = None) -> int:
    """Do the runs that are missing and print the table; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        jobs = list(grid(arguments.corpus, arguments.epsilons, arguments.seeds, arguments.only))
        lines = read_results(arguments.results)
        waiting = sorted((job for job in jobs if job.key not in lines), key=lambda job: job.seed)
        for job in {job.seed: job for job in waiting}.values():
            call("pretrain", [*job.arguments, "--quiet"], arguments.deadline)  # once a seed, before runs race for it
        failures = run_all(waiting, arguments.results, arguments.jobs, arguments.deadline)
        print("\n".join(table(jobs, read_results(arguments.results))))
    except FedlmError as error:
        print(f"privacy_study: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("privacy_study: interrupted; start it again to go on", file=sys.stderr)
        return 130
    return 1 if failures else 0


def grid(corpus: Path, epsilons: Iterable[float], seeds: Sequence[int], only: Sequence[str]) -> Iterator[PrivacyJob]:
    """Yield the runs in the order of the table; the noiseless one once a seed."""
    names = [name for name in VARIANTS if not only or name in only]
    for epsilon in (0.0, *epsilons):
        for name in names:
            if (name == NOISELESS) == (epsilon == 0):
                yield from (PrivacyJob(name, epsilon, seed, corpus) for seed in seeds)


def table(jobs: Iterable[PrivacyJob], lines: Mapping[str, Line]) -> Iterator[str]:
    """Yield a Markdown table: a row for each variant and epsilon that has results."""
    rows: dict[tuple[float, str], dict[int, Line]] = {}
    for job in jobs:
        if job.key in lines:
            rows.setdefault((job.epsilon, job.variant), {})[job.seed] = lines[job.key]
    yield "| target | variant | true epsilon | perplexity | each seed | base | against gaussian |"
    yield "|---|---|---|---|---|---|---|"
    for (epsilon, variant), by_seed in rows.items():
        found = perplexities(by_seed)
        base = mean(number(line, "perplexity_initial") for line in by_seed.values())
        cells = (
            "none" if variant == NOISELESS else f"{epsilon:g}",
            variant,
            "-" if variant == NOISELESS else _spent(by_seed.values()),
            f"{mean(found.values()):.1f}",
            ", ".join(f"{value:.1f}" for value in found.values()),
            f"{base:.1f}",
            "-" if variant == REFERENCE else difference(found, perplexities(rows.get((epsilon, REFERENCE), {}))),
        )
        yield f"| {' | '.join(cells)} |"


def _spent(lines: Collection[Line]) -> str:
    return with_stamps(f"{max(number(line, 'epsilon') for line in lines):.3g}", lines)


def perplexities(by_seed: Mapping[int, Line]) -> dict[int, float]:
    """Return the perplexity of each seed's line."""
    return {seed: number(line, "perplexity") for seed, line in by_seed.items()}


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
