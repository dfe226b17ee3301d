"""Rounds that train some blocks and not others, and a server that changes what no device sends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from safetensors.numpy import load_file
from tiny_private_runs import StoppedError, lines, quiet, stop_in

from clients import app as client
from clients.host import DeviceHost
from clients.node_sum import NodeSum
from fedlm.codec import to_text
from fedlm.config.load import config_to_toml
from fedlm.config.schema import Config
from fedlm.errors import ConfigError
from fedlm.experiment import Experiment
from fedlm.messages import EMPTY_IDS, FROM_SCRATCH, Broadcast, EvaluateRequest, TrainRequest
from fedlm.privacy import ClipSpec
from fedlm.randomness import round_key
from fedlm.strategies import Release, ServerOptimizer, Strategy, StrategyState, UpdateSpec, Vector
from server import app as server
from simulations.grids.inprocess import InProcessGrid
from simulations.run import resume, simulate

Make = Callable[..., Config]
KEYS = ("execution.grid=inprocess", "rounds=4", "execution.checkpoint_every=1", "execution.eval_every=0")


class Alternating(ServerOptimizer):
    """LoRA's B in odd rounds and its A in even ones (RoLoRA); biases and rows always."""

    def moves(self, round_number: int, spec: UpdateSpec) -> tuple[str, ...]:
        resting = "lora_a" if round_number % 2 else "lora_b"
        return tuple(block.name for block in spec.blocks if block.kind != resting)

    def update(self, state: StrategyState, release: Release) -> tuple[Vector, dict[str, float]]:
        return state.values + release.mean, {}


class Halving(Alternating):
    """Devices train all and send B alone; the server halves A as it goes."""

    def moves(self, round_number: int, spec: UpdateSpec) -> tuple[str, ...]:
        return tuple(block.name for block in spec.blocks)

    def sends(self, round_number: int, spec: UpdateSpec) -> tuple[str, ...]:
        return tuple(block.name for block in spec.blocks if block.kind == "lora_b")

    def changes(self, round_number: int, spec: UpdateSpec) -> tuple[str, ...]:
        return tuple(block.name for block in spec.blocks if block.kind in ("lora_a", "lora_b"))

    def step(self, state: StrategyState, release: Release) -> tuple[StrategyState, dict[str, float]]:
        assert release.spec.full is not None
        for block in release.spec.full.blocks:
            if block.kind == "lora_a":
                block.view(state.values)[...] *= 0.5
        return super().step(state, release)


class Resting(Halving):
    """Devices train B alone, on the A that the server has halved."""

    def moves(self, round_number: int, spec: UpdateSpec) -> tuple[str, ...]:
        return self.sends(round_number, spec)


class Silent(Halving):
    """The same, without saying so."""

    def changes(self, round_number: int, spec: UpdateSpec) -> tuple[str, ...]:
        return self.sends(round_number, spec)


def kind_of(strategy: type[Strategy]) -> str:
    return f"strategy.kind={__name__}:{strategy.__name__}"


def after(run: Path, t: int) -> Vector:
    return load_file(run / "checkpoints" / f"round_{t:06d}.safetensors")["values"]


def views_by_kind(config: Config, values: Vector) -> dict[str, Vector]:
    spec = Experiment.open(config).trainable().spec
    kinds: dict[str, list[Vector]] = {}
    for block in spec.blocks:
        kinds.setdefault(block.kind, []).append(block.view(values).ravel())
    return {kind: np.concatenate(parts) for kind, parts in kinds.items()}


@pytest.fixture(scope="module")
def config(small: Make) -> Config:
    return small(*KEYS, kind_of(Alternating), "privacy.reproducible_cohorts=true")


@pytest.fixture(scope="module")
def reference(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alternating") / "run"
    simulate(config, run, quiet)
    return run


def test_what_rests_in_a_round_stays_and_what_moves_is_all_that_is_sent(config: Config, reference: Path) -> None:
    before, now = (views_by_kind(config, after(reference, t)) for t in (3, 4))  # round 4 moves A
    assert np.array_equal(before["lora_b"], now["lora_b"])
    assert (before["lora_a"] != now["lora_a"]).all()
    assert (before["bias"] != now["bias"]).any()
    rounds = [line for line in lines(reference, "ledger.jsonl") if line["event"] == "round"]
    rows = 300 * (32 + 1)  # of the tied table, with the output biases
    fixed = {t: now["bias"].size + now["lora_b" if t % 2 else "lora_a"].size for t in range(1, 5)}
    for line in rounds:
        assert line["bytes_up"] == 4 * line["trained"] * (rows + fixed[line["round"]])


@pytest.mark.parametrize("num_nodes", [1, 3])
def test_nodes_in_one_process_and_a_resumed_run_have_the_same_bits(
    config: Config, reference: Path, tmp_path: Path, num_nodes: int
) -> None:
    run_config = {"config": config_to_toml(config), "out": str(tmp_path / "run")}
    with InProcessGrid(client.app, num_nodes=num_nodes, run_config=run_config) as grid:
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(run_config))
        server.app(grid, context)
    assert np.array_equal(after(tmp_path / "run", 4), after(reference, 4))


def test_a_run_that_stopped_in_the_middle_goes_on_to_the_same_bits(
    config: Config, reference: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        simulate(config, tmp_path / "run", stop_in(3))
    resume(tmp_path / "run", quiet)
    assert np.array_equal(after(tmp_path / "run", 4), after(reference, 4))
    assert lines(tmp_path / "run", "metrics.jsonl")[-1]["megabytes_down"] == pytest.approx(
        lines(reference, "metrics.jsonl")[-1]["megabytes_down"]
    )


def test_ray_workers_have_the_same_bits(config: Config, reference: Path, tmp_path: Path) -> None:
    execution = replace(config.execution, grid="ray", workers=2)
    simulate(replace(config, execution=execution), tmp_path / "run", quiet)
    assert np.array_equal(after(tmp_path / "run", 4), after(reference, 4))


def test_devices_that_train_alone_have_the_updates_of_groups(config: Config, reference: Path, tmp_path: Path) -> None:
    execution = replace(config.execution, group_size=1)
    simulate(replace(config, execution=execution), tmp_path / "run", quiet)
    moved = after(reference, 4) - after(reference, 3)
    difference = after(tmp_path / "run", 4) - after(reference, 4)
    assert np.linalg.norm(difference) < 1e-3 * np.linalg.norm(moved)


def test_what_the_server_alone_changes_reaches_the_nodes(small: Make, tmp_path: Path) -> None:
    """The node holds, after patches alone, every bit of the server's model; devices trained A and did not send it."""
    config = small(*KEYS, kind_of(Halving), "execution.workers=1")
    simulate(config, tmp_path / "run", quiet)
    (host,) = client._hosts.values()
    values = after(tmp_path / "run", 4)
    for name, view in Experiment.open(config).trainable().spec.views(values).items():
        assert np.array_equal(view, host._blocks[name]), name
    base = views_by_kind(config, Experiment.open(config).trainable().initial_values())
    assert np.array_equal(views_by_kind(config, values)["lora_a"], base["lora_a"] * np.float32(0.5**4))
    sent = load_file(next((tmp_path / "run" / "journal").iterdir()))["mean"]
    assert sent.size == base["lora_b"].size


def test_a_node_opens_a_round_on_the_values_that_it_starts_from(small: Make) -> None:
    """Another run of this seed has the same keys; what an evaluation of the first left in the model is not its base."""
    config = small(*KEYS, kind_of(Resting))
    server.ensure_base(config, quiet)
    spec, base = (trainable := Experiment.open(config).trainable()).spec, trainable.initial_values()
    resting, moving = ([b.name for b in spec.blocks if b.kind == kind] for kind in ("lora_a", "lora_b"))
    users = Experiment.open(config).store.users("eval")[:1]

    def broadcast(run: str, to_version: int, values: Vector) -> Broadcast:
        rows = np.arange(300)
        return Broadcast(
            run, FROM_SCRATCH, to_version, [], EMPTY_IDS, values, moving, moving, rows, round_key(1, 1), 0.0
        )

    def trained(host: DeviceHost, run: str) -> np.ndarray:
        request = TrainRequest(np.arange(3), np.array([3]), to_text(ClipSpec(0.3)), sum_name=run)
        host.train(broadcast(run, 0, base), request, kept := NodeSum())
        return kept.flush(run).total

    other = base.copy()
    for name in (*resting, *moving):
        spec.views(other)[name][...] += 0.5
    used, fresh = DeviceHost(config), DeviceHost(config)
    trained(used, "first")
    used.evaluate(broadcast("first", 1, other), EvaluateRequest(users))
    assert np.array_equal(trained(used, "second"), trained(fresh, "second"))


def test_a_server_that_changes_what_it_did_not_name_is_refused(small: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Silent\.step changed '.*lora_A.*', which its `changes` does not name"):
        simulate(small(*KEYS, kind_of(Silent)), tmp_path / "run", quiet)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("privacy.mechanism=blt", "trainable.embedding_rows.sampler=top_k"), "sends other blocks in other rounds"),
        (("privacy.allocation=adaptive",), "other kinds of blocks in other rounds"),
        (("audit.canaries=2",), "an audit's canaries need all blocks in every round"),
    ],
)
def test_what_cannot_follow_the_switches_is_refused_before_any_round(
    small: Make, tmp_path: Path, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        simulate(small(*KEYS, kind_of(Alternating), *overrides), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_the_plan_says_what_the_rounds_cost_in_the_mean(config: Config, tmp_path: Path, capsys: Any) -> None:
    from fedlm.cli import main

    (tmp_path / "job.toml").write_text(config_to_toml(config))
    assert main(["plan", str(tmp_path / "job.toml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = {kind: part.size for kind, part in views_by_kind(config, after_base(config)).items()}
    rows = 300 * (32 + 1)
    assert found["payload"]["up"] == 4 * (rows + sizes["bias"]) + 2 * (sizes["lora_a"] + sizes["lora_b"])
    assert found["coordinates"] == rows + sizes["bias"] + max(sizes["lora_a"], sizes["lora_b"])


def after_base(config: Config) -> Vector:
    return Experiment.open(config).trainable().initial_values()
