"""A strategy with options of its own, added from outside in one file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_job import Job

SIGN = '''
    """Moves every coordinate by the sign of its release."""
    from dataclasses import dataclass

    import numpy as np

    from fedlm.config.schema import option
    from fedlm.strategies import ServerOptimizer


    @dataclass(frozen=True)
    class SignOptions:
        step: float = option(0.5, "length of a step", above=0, high=2)


    class Sign(ServerOptimizer):
        """Signed steps."""

        Options = SignOptions

        def update(self, state, release):
            step = np.float32(self.options.step) * np.sign(release.mean)
            return state.values + step, {"step": self.options.step}
'''
KIND = "strategy.kind=sign_steps:Sign"


def moved(job: Job) -> np.ndarray:
    first, last = (load_file(job.run / "checkpoints" / f"round_00000{t}.safetensors")["values"] for t in (0, 2))
    return np.asarray(last - first)


def test_a_strategy_beside_the_config_runs_with_its_options(job: Job) -> None:
    job.write("sign_steps", SIGN)
    job.simulate(KIND, "strategy.options.step=0.25")
    assert set(np.round(np.abs(moved(job)) / 0.25, 3).tolist()) <= {0.0, 1.0, 2.0}
    assert "step = 0.25" in (job.run / "config.toml").read_text()
    assert job.lines("metrics.jsonl")[-1]["step"] == 0.25


def test_its_options_are_checked_shown_and_hashed_like_every_other_key(job: Job) -> None:
    job.write("sign_steps", SIGN)
    assert "unknown key 'strategy.options.stpe'; did you mean 'strategy.options.step'?" in job.refusal(
        KIND, "strategy.options.stpe=1"
    )
    assert "strategy.options.step = 3 is not allowed; expected a number > 0 and <= 2" in job.refusal(
        KIND, "strategy.options.step=3"
    )
    assert "unknown key 'strategy.options.beta1'" in job.refusal(KIND, "strategy.options.beta1=0.5")
    row = job.shown("strategy.options.step", KIND, "strategy.options.step=1")
    assert (row["value"], row["default"], row["help"]) == (1.0, 0.5, "length of a step")
    hashes = [job.fedlm("config check", KIND, f"strategy.options.step={step}")[1]["hash"] for step in (0.5, 1, 2)]
    assert len(set(hashes)) == 3
    assert hashes[0] == job.fedlm("config check", KIND)[1]["hash"]


def test_a_module_that_python_has_already_is_refused_in_one_line(job: Job) -> None:
    job.write("server", SIGN)
    message = job.refusal("strategy.kind=server:Sign")
    assert "means" in message
    assert "already has a module 'server'" in message
    assert "rename the file" in message
    assert "did you mean 'fedavg'?" in job.refusal("strategy.kind=fedavgg")


def test_a_user_s_own_server_shadows_nothing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: the working folder has a `server.py`, and the plug-in lies beside it."""
    job.write("server", "raise RuntimeError('read in place of the package')\n")
    job.write("sign_steps", SIGN)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "fedlm.cli", "simulate", "job.toml", "--json", "--quiet", "--out", "run"]
    command += ["--set", KIND, "--set", "rounds=1"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=job.folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    environment["PYTHONPATH"] = f"{job.folder}{os.pathsep}{root}"
    done = subprocess.run(command, cwd=job.folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "server.py hides the package 'server' of fedlm" in done.stderr


def test_a_run_is_resumed_from_anywhere(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job.write("sign_steps", SIGN)
    job.simulate(KIND, "rounds=1")
    root = Path(__file__).resolve().parents[2]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "fedlm.cli", "resume", str(job.run), "--json", "--quiet"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
