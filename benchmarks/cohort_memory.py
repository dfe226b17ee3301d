"""Whether the server's memory grows with the cohort: `fedlm simulate` with 200 and with 2,000 devices a round.

Each cohort is one real run of the command line on Ray; this process samples the run's peak memory from outside.

    python -m benchmarks.cohort_memory ubuntu_irc.users.jsonl.xz
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import machine, status_mb

SAMPLE_S = 0.25
SMALL = [
    "vocabulary.size=20_000", "model.d_model=64", "model.num_layers=2", "model.num_heads=2",
    "data.max_tokens_per_user=200", "data.max_eval_tokens=2_000", "pretrain.epochs=1", "pretrain.negatives=512",
    "trainable.lora.rank=4", "trainable.embedding_rows.count=2_000", "loss.negatives=128",
    "privacy.epsilon=0", "privacy.noise_multiplier=1", "privacy.population=0", "privacy.expected_cohort=0",
    "execution.grid='ray'", "execution.eval_every=0",
]  # fmt: skip


def main() -> None:
    """Run every cohort once and print peak memory of driver and workers."""
    arguments = _parser().parse_args()
    result: dict[str, Any] = {"machine": machine(), "corpus": Path(arguments.corpus).name, "rounds": arguments.rounds}
    result["cohorts"] = {}
    with tempfile.TemporaryDirectory() as folder:
        common = [*SMALL, f"data.corpus={arguments.corpus}", f"execution.workers={arguments.workers}"]
        if _command("pretrain", common, folder).wait():  # apart, so that every run starts alike
            raise SystemExit("the base could not be trained")
        for cohort in arguments.cohorts:
            print(f"cohort {cohort}", file=sys.stderr)
            result["cohorts"][cohort] = run(cohort, arguments.rounds, common, folder)
    print(json.dumps(result, indent=2) if arguments.json else _table(result))


def run(cohort: int, rounds: int, common: list[str], folder: str) -> dict[str, float]:
    """Simulate one cohort size in a process of its own and return what it took."""
    overrides = [*common, f"fleet.cohort={cohort}", f"rounds={rounds}"]
    process = _command("simulate", overrides, folder, "--out", f"{folder}/run{cohort}")
    watched, driver_mb, workers_mb = psutil.Process(process.pid), 0.0, 0.0
    while process.poll() is None:
        driver_mb = max(driver_mb, _peak_mb(process.pid))
        workers_mb = max([workers_mb, *(_peak_mb(p.pid) for p in _workers(watched))])
        time.sleep(SAMPLE_S)
    if process.returncode:
        raise SystemExit(f"the run with cohort {cohort} ended with exit code {process.returncode}")
    assert process.stdout is not None
    summary = json.loads(process.stdout.read())
    return {
        "driver_mb": driver_mb,
        "worker_mb": workers_mb,
        "devices_trained": summary["devices_trained"],
        "devices_per_second": summary["devices_per_second"],
        "seconds": summary["seconds"],
    }


def _command(verb: str, overrides: list[str], folder: str, *options: str) -> subprocess.Popen[str]:
    sets = [word for text in (*overrides, f"data.cache_dir={folder}/cache") for word in ("--set", text)]
    command = [sys.executable, "-m", "fedlm.cli", verb, *sets, *options, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _workers(driver: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in driver.children(recursive=True):
        try:
            if any("ray::Worker" in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue  # it has just ended
    return found


def _peak_mb(pid: int) -> float:
    """Return a process's peak resident memory so far in MB, or 0 when it has ended."""
    try:
        return status_mb("VmHWM", pid)
    except (ProcessLookupError, FileNotFoundError):
        return 0.0


def _table(result: dict[str, Any]) -> str:
    cohorts = result["cohorts"]
    first = next(iter(cohorts.values()))
    lines = [
        f"{result['corpus']}, {result['rounds']} rounds, vocabulary 20,000, LoRA and 2,000 rows",
        result["machine"],
        "",
        f"{'cohort':>8}{'trained':>9}{'driver':>10}{'ratio':>7}{'worker':>10}{'ratio':>7}{'devices/s':>11}{'time':>8}",
    ]
    for cohort, found in cohorts.items():
        lines.append(
            f"{cohort:8}{found['devices_trained']:9,}"
            f"{found['driver_mb']:7.0f} MB{found['driver_mb'] / first['driver_mb']:7.3f}"
            f"{found['worker_mb']:7.0f} MB{found['worker_mb'] / first['worker_mb']:7.3f}"
            f"{found['devices_per_second']:11.1f}{found['seconds']:6.0f} s"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="a users.jsonl[.xz] file")
    parser.add_argument("--cohorts", type=int, nargs="+", default=[200, 2_000], help="expected devices a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    main()
