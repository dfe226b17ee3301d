"""A group that fails costs its work item and nothing else: no bit of the run, no silence, no other way to train."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from clients.host import DeviceHost
from clients.node_sum import NodeSum
from fedlm.codec import to_text
from fedlm.config.schema import Config
from fedlm.errors import WorkerError
from fedlm.experiment import Experiment
from fedlm.messages import EMPTY_IDS, EMPTY_VECTOR, Broadcast, TrainReply, TrainRequest
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.randomness import round_key
from fedlm.training.grouped.trainer import GroupResult, GroupTrainer
from server.app import ensure_base
from simulations.run import simulate

Make = Callable[..., Config]
OPTIONS = ("execution.grid=inprocess", "rounds=2", "execution.eval_every=0")
GROUP = np.array([3, 5, 8, 13])


def ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def final_values(run: Path) -> np.ndarray:
    return load_file(max((run / "checkpoints").glob("*.safetensors")))["values"]


def fail_when(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
    """Have the group trainer raise at some of its calls, once the work is half done."""
    train, calls = GroupTrainer.train, iter(range(10**6))

    def failing(self: GroupTrainer, tokens: Sequence[Any], *, key: bytes, devices: Sequence[int]) -> list[GroupResult]:
        results = train(self, tokens, key=key, devices=devices)
        if fails(next(calls)):
            raise RuntimeError("not enough memory\nfor this")
        return results

    monkeypatch.setattr(GroupTrainer, "train", failing)


def test_a_failing_group_is_in_the_ledger_and_changes_no_bit(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(small(*OPTIONS), tmp_path / "quiet", lambda event: None)
    fail_when(monkeypatch, lambda call: call in {0, 1, 4})
    simulate(small(*OPTIONS), tmp_path / "run", lambda event: None)
    lost = [line for line in ledger(tmp_path / "run") if line["event"] == "work_lost"]
    assert len(lost) == 3
    assert all("a group of 4 devices failed: RuntimeError: not enough memory" in line["reason"] for line in lost)
    assert np.array_equal(final_values(tmp_path / "run"), final_values(tmp_path / "quiet"))


def test_a_group_that_always_fails_ends_the_run_with_its_cause(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_when(monkeypatch, lambda call: True)
    with pytest.raises(
        WorkerError, match=r"failed 4 times.*a group of 4 devices failed: RuntimeError: not enough"
    ) as e:
        simulate(small(*OPTIONS), tmp_path / "run", lambda event: None)
    assert "\n" not in str(e.value)


def test_without_diagnostics_a_failing_group_tells_its_kind_alone(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an exception says may hold a device's data."""
    fail_when(monkeypatch, lambda call: call == 0)
    simulate(small(*OPTIONS, "privacy.non_private_diagnostics=false"), tmp_path / "run", lambda event: None)
    [lost] = [line for line in ledger(tmp_path / "run") if line["event"] == "work_lost"]
    assert "RuntimeError" in lost["reason"]
    assert "memory" not in lost["reason"]


def train_on(host: DeviceHost, devices: np.ndarray) -> tuple[TrainReply, np.ndarray]:
    """One group on one host: its reply and the exact sum."""
    nothing = Broadcast("run", 0, 0, [], EMPTY_IDS, EMPTY_VECTOR, [], [], np.arange(300), round_key(1, 1), 0.0)
    request = TrainRequest(devices, np.array([len(devices)]), to_text(ClipSpec(0.3)), sum_name="a")
    kept = NodeSum()
    return host.train(nothing, request, kept), kept.flush("a").total


def test_a_text_that_cannot_be_read_costs_its_group_mates_no_bit(
    small: Make, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The others' sum is that of a group without the device: they do not train in another way because of it."""
    config = small(*OPTIONS, f"data.cache_dir={tmp_path_factory.mktemp('broken')}")
    ensure_base(config, lambda event: None)
    experiment = Experiment.open(config)
    host = DeviceHost(config)
    user = int(experiment.fleet[GROUP[1]])
    offsets = np.load(experiment.store.folder / "offsets.npy")
    tokens = np.memmap(experiment.store.folder / "tokens.bin", np.int32, "r+")
    without, expected = train_on(host, np.delete(GROUP, 1))
    for word in (-1, 10**6):
        tokens[offsets[user + 1] - 1] = word
        tokens.flush()
        reply, total = train_on(host, GROUP)
        assert reply.failed.tolist() == [GROUP[1]]
        assert "IndexError" in reply.causes[0]
        assert np.array_equal(total, expected)
        assert reply.devices.tolist() == without.devices.tolist() == np.delete(GROUP, 1).tolist()
