"""`flwr run` on Flower's own runtime trains the same model as `fedlm simulate`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlm.config.load import config_to_toml
from fedlm.config.schema import Config
from simulations.run import simulate

APP = Path(__file__).resolve().parents[2] / "examples" / "flower_app"
DEADLINE_S = 300
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ADDRESS": "local",  # not somebody else's Ray that happens to run on this machine
}
HOME = """
[superlink]
default = "local"
[superlink.local]
address = "127.0.0.1:{port}"
insecure = true
options.num-supernodes = 2
options.backend.client-resources.num-cpus = 1
options.backend.client-resources.num-gpus = 0
options.backend.init-args.num-cpus = 2
options.backend.init-args.num-gpus = 0
"""


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A SuperLink with two simulated nodes on a free port; yields a function that calls `flwr`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(HOME.format(port=port))
    # A working copy of the package must be importable by the SuperLink's subprocesses, wherever they start.
    environment = {
        **os.environ,
        **QUIET,
        "FLWR_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    options = ["--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)]
    superlink = subprocess.Popen(
        ["flower-superlink", *options, "--log-file", str(tmp_path / "superlink.log")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            break
        except (urllib.error.URLError, OSError):
            assert superlink.poll() is None, (tmp_path / "superlink.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def call(*arguments: str) -> Any:
        done = subprocess.run(
            ["flwr", *arguments], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        return json.loads(done.stdout) if "json" in arguments else done.stdout

    try:
        yield call
    finally:
        superlink.terminate()
        superlink.wait(timeout=60)


def test_flwr_run_equals_simulate(small: Callable[..., Config], tmp_path: Path, flower: Callable[..., Any]) -> None:
    config = small("execution.grid=inprocess", "rounds=2")
    simulate(config, tmp_path / "simulate", lambda event: None)
    run_config = tmp_path / "run-config.toml"
    run_config.write_text(f"config = '''\n{config_to_toml(config)}'''\nout = '{tmp_path / 'flower'}'\n")
    started = flower("run", str(APP), "local", "--run-config", str(run_config), "--format", "json")
    assert started["success"], started
    run_id, deadline = str(started["run-id"]), time.monotonic() + DEADLINE_S
    while not (status := flower("list", "--run-id", run_id, "--format", "json")["runs"][0]["status"]).startswith(
        "finished"
    ):
        assert time.monotonic() < deadline, status
        time.sleep(1)
    assert status == "finished:completed", flower("log", run_id, "--show")
    ours, theirs = (
        load_file(max((tmp_path / name / "checkpoints").glob("*.safetensors")))["values"]
        for name in ("simulate", "flower")
    )
    np.testing.assert_allclose(theirs, ours, atol=1e-6, rtol=0)
    scores = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["perplexity"]
        for name in ("simulate", "flower")
    ]
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)
