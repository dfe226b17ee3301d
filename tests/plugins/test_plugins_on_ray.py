"""Plug-ins of nodes are found by Ray's workers, and a user's own `clients.py` and `server.py` shadow nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from test_loss_plugin import SMOOTH
from test_metric_plugins import DISTINCT, RARE
from tiny_job import Job

ROOT = Path(__file__).resolve().parents[2]


def test_losses_and_metrics_beside_the_config_run_on_workers(job: Job) -> None:
    for name, source in (("smooth", SMOOTH), ("rare_words", RARE), ("distinct_words", DISTINCT)):
        job.write(name, source)
    for name in ("clients", "server"):
        job.write(name, "raise RuntimeError('read in place of the package')\n")
    sets = [
        "loss.kind=smooth:Smooth",
        "evaluation.metrics=['rare_words:Rare']",
        "privacy.metrics=['distinct_words:Distinct']",
        "execution.grid=ray",
        "execution.workers=1",
    ]
    command = [sys.executable, "-m", "fedlm.cli", "simulate", "job.toml", "--json", "--quiet", "--out", "run"]
    command += [word for override in sets for word in ("--set", override)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=job.folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (job.folder / "run").rename(job.folder / "on_ray")
    assert (
        json.loads(done.stdout)["evaluation"] == job.simulate(*sets[:3])["evaluation"]
    )  # the same bits in one process
