"""Whole runs with nodes that lie: in training and evaluation, the same bits as without them, or one clear end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_replies import MALFORMED, one_of
from flwr.app import ConfigRecord, Context, Message, RecordDict
from safetensors.numpy import load_file

from clients.app import app as client_app
from fedlm.config.load import config_to_toml
from fedlm.config.schema import Config
from fedlm.errors import WorkerError
from server import app as server
from server.nodes import MAX_REFUSED
from simulations.grids.inprocess import InProcessGrid
from simulations.run import simulate

Make = Callable[..., Config]
Change = Callable[[RecordDict], RecordDict]
OPTIONS = ("execution.grid=inprocess", "execution.eval_every=1", "rounds=3", "execution.group_size=2")


class LyingGrid(InProcessGrid):
    """Nodes in this process, some of whose replies are changed on the way."""

    def __init__(self, config: Config, out: Path, *, num_nodes: int, num_liars: int, change: Change) -> None:
        self.run_config = {"config": config_to_toml(config), "out": str(out)}
        super().__init__(client_app, num_nodes=num_nodes, run_config=self.run_config)
        self._liars, self._change = self.get_node_ids()[:num_liars], change

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = super().pull_messages(message_ids)
        for reply in replies:
            if reply.metadata.src_node_id in self._liars and not reply.has_error():
                reply.content = self._change(reply.content)
        return replies

    def train(self) -> None:
        """Run the experiment on these nodes."""
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=self.run_config)
        with self:
            server.app(self, context)


def ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def comparable(run: Path) -> list[dict[str, Any]]:
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if "seconds" not in k} for m in metrics]


def final_values(run: Path) -> np.ndarray:
    return load_file(max((run / "checkpoints").glob("*.safetensors")))["values"]


@pytest.fixture(scope="module")
def honest(small: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without liars."""
    out = tmp_path_factory.mktemp("honest") / "run"
    simulate(small(*OPTIONS), out, lambda event: None)
    return out


def set_scalar(name: str, value: Any) -> Change:
    """Return what changes one scalar of the replies that have it."""

    def change(content: RecordDict) -> RecordDict:
        return RecordDict({
            key: ConfigRecord({**record, name: value}) if name in record and key.endswith("scalars") else record
            for key, record in content.items()
        })  # fmt: skip

    return change


def anything_malformed(seed: int) -> Change:
    rng = np.random.default_rng(seed)
    return lambda content: one_of(rng, [m for m in MALFORMED if _has_arrays(content) or m in _FOR_SCALARS])(
        rng, content
    )


_FOR_SCALARS = [m for m in MALFORMED if m.__name__ in {"no_record", "other_record", "more_fields"}]


def _has_arrays(content: RecordDict) -> bool:
    return any(content.array_records.values())


LIES = {
    "anything": anything_malformed(1),
    "nan scores": set_scalar("nll", float("nan")),
    "scores whose square overflows": set_scalar("log_z", 1e300),
    "scores of no token": set_scalar("num_tokens", 0),
    "negative devices": set_scalar("num_devices", -1),
    "memory that is not finite": set_scalar("peak_mb", float("inf")),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_node_changes_no_bit_of_the_run(small: Make, honest: Path, tmp_path: Path, lie: str) -> None:
    grid = LyingGrid(small(*OPTIONS), tmp_path / "run", num_nodes=3, num_liars=1, change=LIES[lie])
    grid.train()
    assert np.array_equal(final_values(tmp_path / "run"), final_values(honest))
    assert comparable(tmp_path / "run") == comparable(honest)
    lost = [line for line in ledger(tmp_path / "run") if line["event"] == "work_lost"]
    [left_out] = [line for line in ledger(tmp_path / "run") if line["event"] == "node_left_out"]
    assert len(lost) == MAX_REFUSED == left_out["refused"]
    assert "gets no more work in this run" in lost[-1]["reason"]
    assert {line["worker"] for line in lost} == {str(left_out["node_id"])}


@pytest.mark.parametrize("lie", ["anything", "nan scores", "negative devices"])
def test_a_run_of_liars_alone_ends_with_one_clear_line(small: Make, tmp_path: Path, lie: str) -> None:
    grid = LyingGrid(small(*OPTIONS), tmp_path / "run", num_nodes=2, num_liars=2, change=LIES[lie])
    with pytest.raises(WorkerError, match="no node is left: each of 2 sent 3 replies that cannot be used") as caught:
        grid.train()
    assert str(caught.value).isprintable()
    assert sum(line["event"] == "node_left_out" for line in ledger(tmp_path / "run")) == 2
