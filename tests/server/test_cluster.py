"""A Ray cluster of several machines, here several raylets of this one, that loses a machine in mid-round."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from fedlm.config.schema import Config
from simulations.grids.ray_session import QUIET, available_cores
from simulations.run import simulate

NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100 * 2**20}
QUICK = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Three raylets with one processor each: two for the workers, one to spare."""
    if available_cores() < 2:
        pytest.skip("a cluster of three raylets needs two processor cores")
    for name, value in QUIET.items():  # as the product sets them, before Ray is imported
        monkeypatch.setenv(name, value)
    utils = importlib.import_module("ray.cluster_utils")
    started = utils.Cluster(
        initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "_system_config": QUICK}
    )
    try:
        for _ in range(2):
            started.add_node(**NODE)
        started.wait_for_nodes()
        yield started
    finally:
        started.shutdown()


def processes(node: Any) -> list[psutil.Process]:
    """Return the raylet of a machine of the cluster and all that it has started."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [raylet, *raylet.children(recursive=True)]


def workers(node: Any) -> list[psutil.Process]:
    """Return our workers on this machine."""
    return [process for process in processes(node) if any("ray::Worker" in word for word in process.cmdline())]


def test_a_machine_lost_in_mid_round_changes_nothing(
    cluster: Any, small: Callable[..., Config], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ("rounds=3", "execution.eval_every=0", "execution.group_size=2")
    simulate(small("execution.grid=inprocess", *settings), tmp_path / "quiet", lambda event: None)
    lost: list[Any] = []
    nicenesses: set[int] = set()

    def lose(event: dict[str, object]) -> None:
        if event["event"] == "device_done" and event["round"] == 2 and not lost:
            nicenesses.update(process.nice() for node in cluster.worker_nodes for process in workers(node))
            lost.append(next(node for node in cluster.worker_nodes if workers(node)))
            for process in processes(lost[0]):
                process.kill()

    on_cluster = ("execution.grid=ray", "execution.workers=2", f"execution.address={cluster.address}")
    simulate(small(*on_cluster, *settings), tmp_path / "run", lose)
    assert lost
    assert nicenesses == {psutil.Process().nice()}  # of whoever started the cluster
    assert capfd.readouterr().out == ""  # which is for results
    values = [
        load_file(max((tmp_path / name / "checkpoints").glob("*.safetensors")))["values"] for name in ("quiet", "run")
    ]
    assert np.array_equal(*values)
    events = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert any(event["event"] == "worker_lost" and event["round"] == 2 for event in events)
