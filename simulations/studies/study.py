"""What the studies share: a job is one run of a verb in a process of its own, its figures one line of a results file.

A run whose line is there is not done again: interrupt a study and start it again. A line is named by the hash of its
settings, so an edited recipe leaves old lines behind.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from hashlib import sha256
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Protocol

from fedlm.config import Config
from fedlm.config.keys import keys, option_keys, to_flat
from fedlm.errors import DataError, FedlmError
from fedlm.rounding import stamped

RESULTS = Path(__file__).parent / "results"
Line = Mapping[str, Any]


class Job(Protocol):
    """One run of a study; `str` of it is what progress calls it."""

    @property
    def verb(self) -> str:
        """The verb of the command line: it takes `--out`, `--json` and `--quiet`."""

    @property
    def arguments(self) -> list[str]:
        """The words after the verb."""

    @property
    def key(self) -> str:
        """What its line is found by."""

    @property
    def named(self) -> dict[str, Any]:
        """What its line says of it beside the figures."""


def settings_key(config: Config) -> str:
    """Return 12 hexadecimal digits of the settings that differ from the defaults: further keys leave it as it is."""
    defaults = {path: key.default for path, key in (keys() | option_keys(config)).items()}
    settings = {path: value for path, value in to_flat(config).items() if value != defaults[path]}
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return sha256(canonical.encode()).hexdigest()[:12]


def run_all(jobs: Sequence[Job], results: Path, num_jobs: int, deadline_s: float) -> int:
    """Do all runs, `num_jobs` at a time, and store each as it ends; returns how many failed."""
    failures = 0
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
    with tempfile.TemporaryDirectory(prefix="fedlm-study-") as folder:
        words = [*job.arguments, "--out", str(Path(folder) / "run"), "--json", "--quiet"]
        figures = json.loads(call(job.verb, words, deadline_s))
    del figures["run_dir"]  # gone by now
    return {"key": job.key, **job.named, **figures}


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


def difference(these: Mapping[int, float], reference: Mapping[int, float], digits: int = 1) -> str:
    """Return the mean difference over the seeds that both have, with its standard error."""
    found = [these[seed] - reference[seed] for seed in sorted(these.keys() & reference.keys())]
    if len(found) < 2:
        return f"{found[0]:+.{digits}f}" if found else "-"
    return f"{mean(found):+.{digits}f} ± {stdev(found) / math.sqrt(len(found)):.{digits}f}"


def number(line: Line, name: str) -> float:
    """Return a figure; JSON has null for infinity."""
    return math.inf if line[name] is None else float(line[name])


def with_stamps(figure: str, lines: Iterable[Line]) -> str:
    """Return the epsilon of several runs with the verdicts of their stamps; the oldest lines of a file have none."""
    return stamped(figure, [stamp for line in lines for stamp in line.get("stamps", ())])


def call(verb: str, words: Sequence[str], deadline_s: float) -> str:
    """Return what `fedlm VERB WORDS` prints; one thread, since runs stand side by side."""
    command = [sys.executable, "-m", "fedlm.cli", verb, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=deadline_s, env=environment
        )
    except subprocess.TimeoutExpired:
        raise FedlmError(f"`fedlm {verb}` took longer than {deadline_s:g} s; raise --deadline") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FedlmError(f"`fedlm {verb}` ended with exit code {done.returncode}: {last}")
    return done.stdout


def _store(job: Job, future: Future[dict[str, Any]], results: Path, num_left: int) -> bool:
    """Store the line of a run that ended, or say why it has none."""
    try:
        line = future.result()
    except FedlmError as error:
        print(f"{job}: {error}", file=sys.stderr)
        return False
    append_result(results, line)
    print(f"{job}: {line['seconds']:.0f} s, {num_left} to go", file=sys.stderr)
    return True
