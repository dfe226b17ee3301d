"""Whole runs on real chat data: the same bits for any workers, after kills and resumes; failures cost nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import Context, RecordDict
from safetensors.numpy import load_file

from clients.app import app as client_app
from fedlm.config.load import config_to_toml
from fedlm.config.schema import Config
from fedlm.errors import ConfigError, DataError, OutputError
from fedlm.experiment import Experiment
from server import app as server
from simulations.grids.inprocess import InProcessGrid
from simulations.grids.ray_session import RaySession, store_capacity
from simulations.run import resume, simulate

Make = Callable[..., Config]
DEADLINE_S = 240


def final_values(run: Path) -> np.ndarray:
    newest = max((run / "checkpoints").glob("*.safetensors"))
    return load_file(newest)["values"]


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def comparable(run: Path) -> list[dict[str, Any]]:
    """Metrics without what a clock decides."""
    return [{k: v for k, v in m.items() if "seconds" not in k} for m in lines(run, "metrics.jsonl")]


def is_worker(process: psutil.Process) -> bool:
    return process.status() != psutil.STATUS_ZOMBIE and any("ray::Worker" in word for word in process.cmdline())


def quiet(event: dict[str, object]) -> None:
    pass


@pytest.fixture(scope="module")
def reference(small: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run in one process."""
    out = tmp_path_factory.mktemp("reference") / "run"
    simulate(small("execution.grid=inprocess"), out, quiet)
    return out


def test_the_live_line_tells_how_fast_devices_train(small: Make, tmp_path: Path) -> None:
    """However long an evaluation takes: it is no part of a round's seconds."""
    shown: list[dict[str, Any]] = []
    settings = ("execution.grid=inprocess", "rounds=2", "execution.eval_every=1", "fleet.cohort=4")
    simulate(small(*settings), tmp_path / "run", lambda event: shown.append(dict(event)))
    told = [event["devices_per_second"] for event in shown if event["event"] == "round"]
    rounds = lines(tmp_path / "run", "metrics.jsonl")[1:]
    assert told == [pytest.approx(line["devices"] / max(line["round_seconds"], 1e-3)) for line in rounds]


@pytest.mark.parametrize("num_nodes", [2, 3])
def test_nodes_in_one_process_give_the_same_bits(small: Make, reference: Path, tmp_path: Path, num_nodes: int) -> None:
    run_config = {"config": config_to_toml(small("execution.grid=inprocess")), "out": str(tmp_path / "run")}
    with InProcessGrid(client_app, num_nodes=num_nodes, run_config=run_config) as grid:
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config))
        server.app(grid, context)
    assert np.array_equal(final_values(tmp_path / "run"), final_values(reference))
    assert comparable(tmp_path / "run") == comparable(reference)


@pytest.fixture(scope="module")
def on_ray() -> Iterator[None]:
    """Ray is started once for this file; its runs join it and leave it running."""
    session = RaySession(address="", store_bytes=store_capacity(0), on_connect=lambda ray: None)
    session.wait()
    yield
    session.close()


@pytest.mark.usefixtures("on_ray")
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_workers_give_the_same_bits(small: Make, reference: Path, tmp_path: Path, workers: int) -> None:
    simulate(small("execution.grid=ray", f"execution.workers={workers}"), tmp_path / "run", quiet)
    assert np.array_equal(final_values(tmp_path / "run"), final_values(reference))
    assert comparable(tmp_path / "run") == comparable(reference)


@pytest.mark.usefixtures("on_ray")
def test_a_worker_killed_in_each_of_ten_rounds_changes_nothing(small: Make, tmp_path: Path) -> None:
    """A worker takes its part of the round's sum along: those devices are done again, and none is counted twice."""
    longer = ("rounds=10", "execution.eval_every=0", "execution.group_size=2")
    simulate(small("execution.grid=inprocess", *longer), tmp_path / "quiet", quiet)
    killed: set[int] = set()

    def kill(event: dict[str, object]) -> None:
        if event["event"] == "device_done" and event["round"] not in killed:
            killed.add(int(str(event["round"])))
            workers = [p for p in psutil.Process().children(recursive=True) if is_worker(p)]
            workers[len(killed) % len(workers)].kill()

    simulate(small("execution.grid=ray", "execution.workers=2", *longer), tmp_path / "run", kill)
    assert killed == set(range(1, 11))
    assert np.array_equal(final_values(tmp_path / "run"), final_values(tmp_path / "quiet"))
    assert comparable(tmp_path / "run") == comparable(tmp_path / "quiet")
    ledger = lines(tmp_path / "run", "ledger.jsonl")
    assert {line["round"] for line in ledger if line["event"] == "worker_lost"} == killed
    assert {line["event"] for line in ledger} >= {"worker_restarted", "work_lost"}
    summary = next(line for line in ledger if line["event"] == "round")
    assert summary["worker_peak_mb"] > 0
    assert summary["object_store_mb"] > 0


def command(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedlm.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_round(process: subprocess.Popen[str], run: Path, round_number: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    journal = run / "journal" / f"round_{round_number:06d}.safetensors"
    while not journal.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("round_number", [1, 2, 4])
def test_resume_after_kill_9_gives_the_same_bits(
    small: Make, reference: Path, tmp_path: Path, round_number: int
) -> None:
    """Killed right after a release became durable: before and after a checkpoint, and in the last round."""
    file = tmp_path / "run.toml"
    file.write_text(config_to_toml(small("execution.grid=inprocess")))
    process = command("simulate", file, "--out", tmp_path / "run")
    wait_for_round(process, tmp_path / "run", round_number)
    process.kill()
    process.communicate(timeout=30)
    (tmp_path / "run" / "metrics.jsonl").open("a").write('{"round": 2, "torn')
    resume(tmp_path / "run", quiet)
    assert np.array_equal(final_values(tmp_path / "run"), final_values(reference))
    drop = {"step_norm"}
    mine, theirs = ([{k: v for k, v in m.items() if k not in drop} for m in comparable(r)]
                    for r in (tmp_path / "run", reference))  # fmt: skip
    assert mine == theirs


def test_ctrl_c_leaves_a_checkpoint_and_exit_code_130(small: Make, reference: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(config_to_toml(small("execution.grid=inprocess")))
    process = command("simulate", file, "--out", tmp_path / "run")
    wait_for_round(process, tmp_path / "run", 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "fedlm resume" in errors
    assert lines(tmp_path / "run", "ledger.jsonl")[-1]["status"] == "interrupted"
    again = command("resume", tmp_path / "run", "--json")
    output, errors = again.communicate(timeout=DEADLINE_S)
    assert again.returncode == 0, errors
    assert json.loads(output)["rounds"] == 4
    assert np.array_equal(final_values(tmp_path / "run"), final_values(reference))


def test_a_broken_device_is_a_zero_contribution_and_a_ledger_line(
    small: Make, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One user's stored tokens are corrupt: that device fails, the others train, the denominator stays."""
    cache = tmp_path_factory.mktemp("broken")
    config = small("execution.grid=inprocess", f"data.cache_dir={cache}", "rounds=2", "privacy.enabled=false")
    experiment = Experiment.open(config)
    victim = server.plan_of(experiment).sample_cohort(1)[0]
    user = int(experiment.fleet[victim])
    stored = np.load(experiment.store.folder / "offsets.npy")
    tokens = np.memmap(experiment.store.folder / "tokens.bin", np.int32, "r+")
    tokens[stored[user] : stored[user + 1]] = 10**6
    tokens.flush()
    simulate(config, tmp_path / "run", quiet)
    ledger = lines(tmp_path / "run", "ledger.jsonl")
    failure = next(line for line in ledger if line["event"] == "device_failed")
    assert failure["round"] == 1
    assert failure["device"] == victim
    assert "IndexError" in failure["cause"]
    summary = next(line for line in ledger if line["event"] == "round")
    assert summary["trained"] == summary["sampled"] - 1
    assert summary["failed"] == {"IndexError": 1}


def test_diverging_devices_release_noise_alone(small: Make, tmp_path: Path) -> None:
    """Every update is NaN: the round still releases, with nothing but noise in it, and the model stays finite."""
    rates = ("local.learning_rate=1e38", "local.row_learning_rate=1e38", "local.epochs=3")
    simulate(small("execution.grid=inprocess", *rates, "rounds=1"), tmp_path / "run", quiet)
    line = next(line for line in lines(tmp_path / "run", "ledger.jsonl") if line["event"] == "round")
    assert line["trained"] == 0
    assert line["failed"] == {"update not finite": line["sampled"]}
    assert np.isfinite(final_values(tmp_path / "run")).all()


def test_bad_input_is_refused_before_any_work(small: Make, tmp_path: Path, reference: Path) -> None:
    with pytest.raises(OutputError, match="not an empty folder"):
        simulate(small(), reference, quiet)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        simulate(small(), tmp_path / "file" / "run", quiet)
    with pytest.raises(ConfigError, match=r"fleet\.cohort"):
        simulate(small("fleet.cohort=5000"), tmp_path / "a", quiet)
    with pytest.raises(DataError, match=r"fleet\.profile = .*absent\.csv' is no file"):
        simulate(small("fleet.profile=absent.csv"), tmp_path / "b", quiet)
    with pytest.raises(ConfigError, match=r"did you mean .fedavg"):
        simulate(small("strategy.kind=fedavgg"), tmp_path / "c", quiet)
    with pytest.raises(DataError, match="not a run folder"):
        resume(tmp_path, quiet)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
