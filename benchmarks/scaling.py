"""Devices per second and memory of `fedlm simulate`, by cohort, fleet and number of workers; vocabulary 100,000.

Each setting is one real run of the command line on Ray, watched from outside. The cohorts share one fleet and the
fleets one cohort. Memory should depend on neither: the driver holds one sum, a worker one sum and one group of devices,
and a device is a row of data.

    python -m benchmarks.scaling ubuntu_irc.users.jsonl.xz --quick
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import machine, status_mb

SAMPLE_S = 0.5
JOB = [
    "vocabulary.size=100_000", "model.d_model=128", "model.num_layers=2", "trainable.lora.rank=8",
    "trainable.embedding_rows.count=5_000", "loss.negatives=512", "data.max_tokens_per_user=400",
    "data.public_fraction=0.02", "data.max_eval_tokens=2_000", "pretrain.epochs=1", "pretrain.negatives=512",
    "privacy.epsilon=0", "privacy.noise_multiplier=1", "privacy.population=0", "privacy.expected_cohort=0",
    "execution.grid='ray'", "execution.eval_every=0",
]  # fmt: skip
COHORTS, FLEETS, WORKERS = (100, 1_000, 10_000), (1_000, 10_000, 100_000, 1_000_000), (1, 2)
QUICK_COHORTS, QUICK_FLEETS, QUICK_WORKERS = (100, 1_000), (1_000, 1_000_000), (2,)
FLEET_OF_COHORTS, COHORT_OF_FLEETS = 100_000, 100


@dataclass(frozen=True)
class Setting:
    """One run.

    Arguments:
        fleet: Devices; beyond the corpus's users, device d holds the text of user d modulo their number.
        cohort: Expected devices a round.
        workers: Ray workers, one thread each.
    """

    fleet: int
    cohort: int
    workers: int


def main() -> None:
    """Run every setting once and print speed and memory."""
    arguments = _parser().parse_args()
    result: dict[str, Any] = {"machine": machine(), "corpus": Path(arguments.corpus).name, "rounds": arguments.rounds}
    result["runs"] = []
    with tempfile.TemporaryDirectory() as folder:
        common = [*JOB, f"data.corpus={arguments.corpus}", f"rounds={arguments.rounds}"]
        if _command("pretrain", common, folder).wait():  # apart, so that every run starts alike
            raise SystemExit("the base could not be trained")
        for setting in settings(quick=arguments.quick):
            print(setting, file=sys.stderr)
            result["runs"].append(asdict(setting) | run(setting, common, folder))
    print(json.dumps(result, indent=2) if arguments.json else _table(result))


def settings(*, quick: bool) -> list[Setting]:
    """Return the runs: cohorts on one fleet for each number of workers, then fleets with one cohort."""
    cohorts, fleets, workers = (QUICK_COHORTS, QUICK_FLEETS, QUICK_WORKERS) if quick else (COHORTS, FLEETS, WORKERS)
    by_cohort = [Setting(FLEET_OF_COHORTS, cohort, count) for count in workers for cohort in cohorts]
    by_fleet = [Setting(fleet, COHORT_OF_FLEETS, workers[-1]) for fleet in fleets]
    return list(dict.fromkeys(by_cohort + by_fleet))


def run(setting: Setting, common: list[str], folder: str) -> dict[str, float]:
    """Simulate one setting in a process of its own and return what it took."""
    overrides = [*common, f"fleet.devices={setting.fleet}", f"fleet.cohort={setting.cohort}",
                 f"execution.workers={setting.workers}"]  # fmt: skip
    out = f"{folder}/run-{setting.fleet}-{setting.cohort}-{setting.workers}"
    process = _command("simulate", overrides, folder, "--out", out)
    peaks = watch(process)
    if process.returncode:
        raise SystemExit(f"the run of {setting} ended with exit code {process.returncode}")
    assert process.stdout is not None
    summary = json.loads(process.stdout.read())
    kept = ("devices_trained", "devices_per_second", "seconds")
    return peaks | {name: summary[name] for name in kept}


def watch(process: subprocess.Popen[str]) -> dict[str, float]:
    """Wait for a driver to end and return peaks in MB: its own, its largest worker's, and of all processes together.

    The whole program is the sum of proportional sizes (PSS), in which shared pages count once.
    """
    driver = psutil.Process(process.pid)
    peaks = {"driver_mb": 0.0, "worker_mb": 0.0, "program_mb": 0.0}
    while process.poll() is None:
        tree = [process.pid, *_descendants(driver)]
        peaks["driver_mb"] = max(peaks["driver_mb"], _memory_mb(process.pid))
        peaks["worker_mb"] = max([peaks["worker_mb"], *(_memory_mb(pid) for pid in tree if _is_worker(pid))])
        peaks["program_mb"] = max(peaks["program_mb"], sum(map(_proportional_mb, tree)))
        time.sleep(SAMPLE_S)
    return peaks


def _command(verb: str, overrides: list[str], folder: str, *options: str) -> subprocess.Popen[str]:
    sets = [word for text in (*overrides, f"data.cache_dir={folder}/cache") for word in ("--set", text)]
    command = [sys.executable, "-m", "fedlm.cli", verb, *sets, *options, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _descendants(driver: psutil.Process) -> Iterator[int]:
    try:
        yield from (process.pid for process in driver.children(recursive=True))
    except psutil.NoSuchProcess:
        return  # it has just ended


def _is_worker(pid: int) -> bool:
    try:
        return any("ray::Worker" in word for word in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def _memory_mb(pid: int) -> float:
    """Return a process's peak resident memory so far in MB, or 0 when it has ended."""
    try:
        return status_mb("VmHWM", pid)
    except (ProcessLookupError, FileNotFoundError):
        return 0.0


def _proportional_mb(pid: int) -> float:
    """Return a process's proportional memory now in MB, or 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (ProcessLookupError, FileNotFoundError, PermissionError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['corpus']}, {result['rounds']} rounds, vocabulary 100,000, d 128, 2 layers, NCE, LoRA and 5,000 rows",
        result["machine"],
        "",
        f"{'fleet':>10}{'cohort':>8}{'workers':>9}{'trained':>9}{'devices/s':>11}{'driver':>10}{'worker':>10}"
        f"{'program':>11}{'time':>8}",
    ]
    for found in result["runs"]:
        lines.append(
            f"{found['fleet']:10,}{found['cohort']:8,}{found['workers']:9}{found['devices_trained']:9,}"
            f"{found['devices_per_second']:11.1f}{found['driver_mb']:7,.0f} MB{found['worker_mb']:7,.0f} MB"
            f"{found['program_mb']:8,.0f} MB{found['seconds']:6.0f} s"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="a users.jsonl[.xz] file")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two cohorts, two fleets, two workers")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    main()
