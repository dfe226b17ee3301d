"""Whole runs on fleets that lose devices: what is released, accounted, metered, and resumed after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Context, RecordDict
from safetensors.numpy import load_file

from clients.app import app as client_app
from fedlm.config.load import config_to_toml
from fedlm.config.schema import Config
from fedlm.errors import ConfigError, DataError
from fedlm.experiment import Experiment
from fedlm.privacy.plan import PrivacyPlan
from server import app as server
from server.participation import DROPPED_OUT, TRAINS, RoundParticipation, RoundTask
from server.run_guarantee import run_guarantee
from simulations.grids.inprocess import InProcessGrid
from simulations.run import resume, simulate

Make = Callable[..., Config]
INPROCESS = "execution.grid=inprocess"
PROFILE = """class,share,memory_mb,gflops,down_mbit,up_mbit,dropout,spread,utc_offsets_h,h00,h01,h02,h03
old,1,1,5,2,1,0.3,0.2,-1 0,0.9,0.7,0.5,0.6
new,4,,,20,0.01,0.3,0.8,0 1 2,0.9,0.7,0.5,0.6
"""
DEADLINE_S = 240


class Some:
    """A fleet of which the devices that a rule names drop out."""

    def __init__(self, stays: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.bool_]]) -> None:
        self._stays = stays

    def describe(self) -> dict[str, Any]:
        return {"profile": "test"}

    def participation(self, task: RoundTask) -> RoundParticipation:
        outcomes = np.where(self._stays(task.cohort), TRAINS, DROPPED_OUT).astype(np.uint8)
        return RoundParticipation(task, outcomes, np.zeros(len(task.cohort)))


def run(config: Config, out: Path, fleet: Some | None) -> None:
    """Run the ServerApp as a program around it would."""
    run_config = {"config": config_to_toml(config), "out": str(out)}
    server.use_run_context(server.RunContext(fleet=None if fleet is None else lambda experiment, trainable: fleet))
    try:
        with InProcessGrid(client_app, num_nodes=1, run_config=run_config) as grid:
            context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config))
            server.app(grid, context)
    finally:
        server.use_run_context(server.RunContext())


def released(run: Path, t: int = 1) -> npt.NDArray[np.float64]:
    return load_file(run / "journal" / f"round_{t:06d}.safetensors")["mean"].astype(np.float64)


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def quiet(event: dict[str, object]) -> None:
    pass


def test_dropouts_change_neither_divisor_nor_noise(small: Make, tmp_path: Path) -> None:
    """The even half's release and the odd half's add up to everybody's, once the noise is counted once."""
    config = small(INPROCESS, "rounds=1")
    rules = {
        "all": lambda devices: devices >= 0,
        "even": lambda devices: devices % 2 == 0,
        "odd": lambda devices: devices % 2 == 1,
        "none": lambda devices: devices < 0,
    }
    for name, rule in rules.items():
        run(config, tmp_path / name, Some(rule))
    everybody, even, odd, nobody = (released(tmp_path / name) for name in rules)
    assert np.abs(even - nobody).max() > 1e-4
    assert np.abs(odd - nobody).max() > 1e-4
    assert np.allclose(even + odd - nobody, everybody, rtol=0, atol=1e-7)
    # An all-dropped round still releases: exactly the noise of the plan, over the plan's expected cohort.
    plan = PrivacyPlan.from_json((tmp_path / "none" / "plan.json").read_text(), seed=config.seed, cohort_key=None)
    assert (nobody == plan.release(plan.new_sum(len(nobody)), 1).mean).all()
    statements = {lines(tmp_path / name, "ledger.jsonl")[0]["privacy"]["privacy_statement"] for name in rules}
    assert len(statements) == 1


def test_over_selection_samples_accounts_and_divides_by_the_larger_cohort(small: Make) -> None:
    plain, larger = (
        server.plan_of(Experiment.open(small("privacy.epsilon=0", "privacy.noise_multiplier=1", *more)))
        for more in ((), ("fleet.over_selection=1.5",))
    )
    assert (plain.cohort, larger.cohort, larger.expected_cohort) == (24, 36, 36)
    assert larger.sampling_probability == pytest.approx(1.5 * plain.sampling_probability)
    assert larger.epsilon(4) > plain.epsilon(4)
    assert np.mean([len(larger.sample_cohort(t)) for t in range(5)]) == pytest.approx(36, rel=0.3)
    noise = larger.release(larger.new_sum(20_000), 1).mean
    assert noise.std() == pytest.approx(larger.clip_norm / 36, rel=0.03)
    mimicked = small("fleet.over_selection=1.5", "privacy.population=1_000_000", "privacy.expected_cohort=5000")
    assert server.plan_of(Experiment.open(mimicked)).expected_cohort == 7500


def test_more_devices_than_users_are_copies_and_every_figure_says_so(small: Make, tmp_path: Path) -> None:
    config = small(INPROCESS, "rounds=1", "fleet.devices=200_000")
    experiment = Experiment.open(config)
    users = experiment.store.users("train")
    devices = np.random.default_rng(0).integers(0, 200_000, 500)
    assert (experiment.fleet[devices] == users[devices % len(users)]).all()
    summary = simulate(config, tmp_path / "run", quiet)
    stamp = f"PER DEVICE: 200,000 devices hold copies of the text of {len(users):,} users"
    assert stamp in summary.privacy_statement
    assert stamp in (tmp_path / "run" / "report.html").read_text()
    assert lines(tmp_path / "run", "ledger.jsonl")[0]["fleet"] == {
        "profile": "uniform",
        "devices": 200_000,
        "users": len(users),
    }
    plain = Experiment.open(small())
    assert run_guarantee(server.plan_of(plain), plain) == server.plan_of(plain).guarantee()


def test_limits_on_devices_need_a_simulated_fleet(small: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use `fedlm simulate`"):
        run(small(INPROCESS, "fleet.profile=phones"), tmp_path / "run", None)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def virtual(small: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A config whose devices are lost for every cause, and its uninterrupted run."""
    folder = tmp_path_factory.mktemp("virtual")
    (folder / "profile.csv").write_text(PROFILE)
    config = small(
        INPROCESS, f"fleet.profile={folder / 'profile.csv'}", "fleet.deadline_s=60", "fleet.round_interval_s=3600",
        "fleet.device_log=true", "fleet.cohort=100", "execution.eval_every=0",
    )  # fmt: skip
    simulate(config, folder / "run", quiet)
    return config, folder


def test_every_loss_is_in_the_ledger_the_log_the_summary_and_the_report(virtual: tuple[Config, Path]) -> None:
    run = virtual[1] / "run"
    rounds = [line for line in lines(run, "ledger.jsonl") if line["event"] == "round"]
    causes = {"not enough memory", "unavailable", "dropped out", "too late"}
    assert {cause for line in rounds for cause in line["failed"]} == causes
    rows = [line.split(",") for line in (run / "devices.csv").read_text().splitlines()[1:]]
    for line in rounds:
        mine = [row for row in rows if int(row[0]) == line["round"]]
        assert line["sampled"] == len(mine) == line["trained"] + sum(line["failed"].values())
        assert line["failed"] == {cause: n for cause in causes if (n := sum(row[2] == cause for row in mine))}
        assert line["bytes_down"] == sum(int(row[4]) for row in mine)
        assert line["bytes_up"] == sum(int(row[5]) for row in mine)
        assert line["uploaded"] == line["trained"]
        assert line["virtual"]["start_s"] == 3600 * (line["round"] - 1)
        assert line["virtual"]["round_s"] == line["virtual"]["device_s_max"] == 60
    page = (run / "report.html").read_text()
    for word in ("too late", "Virtual seconds of a device", "virtual time", "devices of class old"):
        assert word in page


def test_resume_after_kill_9_gives_the_same_bits_metrics_and_log(virtual: tuple[Config, Path], tmp_path: Path) -> None:
    config, reference = virtual[0], virtual[1] / "run"
    (tmp_path / "run.toml").write_text(config_to_toml(config))
    words = [sys.executable, "-m", "fedlm.cli", "simulate", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    journal, deadline = tmp_path / "run" / "journal" / "round_000002.safetensors", time.monotonic()
    while not journal.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline + DEADLINE_S
        time.sleep(0.002)
    process.kill()
    process.communicate(timeout=30)
    with (tmp_path / "run" / "devices.csv").open("a") as log:
        log.write("3,17,trains,0.100,0,0\n3,18,to")
    summary = resume(tmp_path / "run", quiet)
    assert summary.virtual_hours == pytest.approx(3 + 60 / 3600)
    newest = [max((folder / "checkpoints").glob("*.safetensors")) for folder in (tmp_path / "run", reference)]
    assert np.array_equal(*(load_file(file)["values"] for file in newest))
    assert (tmp_path / "run" / "devices.csv").read_text() == (reference / "devices.csv").read_text()
    assert comparable(tmp_path / "run", "metrics.jsonl") == comparable(reference, "metrics.jsonl")
    mine, theirs = ([line for line in comparable(folder, "ledger.jsonl") if line["event"] == "round"]
                    for folder in (tmp_path / "run", reference))  # fmt: skip
    assert mine == theirs


def comparable(run: Path, name: str) -> list[dict[str, Any]]:
    """Lines without what a clock or a resume decides."""
    drop = {"seconds", "round_seconds", "step_norm"}
    return [{k: v for k, v in line.items() if k not in drop} for line in lines(run, name)]


def test_a_profile_that_changed_is_refused_on_resume(virtual: tuple[Config, Path], tmp_path: Path) -> None:
    (tmp_path / "profile.csv").write_text(PROFILE)
    simulate(small_copy(virtual[0], tmp_path), tmp_path / "run", quiet)
    (tmp_path / "profile.csv").write_text(PROFILE.replace("0.01", "0.02"))
    with pytest.raises(DataError, match=r"profile\.csv' changed since the run began"):
        resume(tmp_path / "run", quiet)


def small_copy(config: Config, folder: Path) -> Config:
    """The config with one round and the profile of a folder."""
    return replace(config, rounds=1, fleet=replace(config.fleet, profile=str(folder / "profile.csv")))
