"""Every example is short and runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = [
    "rounds=2", "vocabulary.size=2000", "model.d_model=32", "model.num_layers=1", "model.num_heads=2",
    "data.max_tokens_per_user=100", "data.max_eval_tokens=1000", "pretrain.epochs=1", "pretrain.negatives=200",
    "trainable.embedding_rows.count=200", "loss.negatives=64", "fleet.cohort=5", "execution.grid=inprocess",
]  # fmt: skip


@pytest.mark.parametrize("source", sorted(EXAMPLES.rglob("*.py")), ids=lambda p: p.name)
def test_examples_are_short(source: Path) -> None:
    assert source.read_text().count("\n") < 100


def test_a_strategy_of_ones_own(tmp_path: Path) -> None:
    sets = [word for override in (*SMALL, f"data.cache_dir={tmp_path}") for word in ("--set", override)]
    command = [sys.executable, "-m", "fedlm.cli", "simulate", str(EXAMPLES / "own_strategy" / "run.toml")]
    done = subprocess.run(
        [*command, *sets, "--out", str(tmp_path / "run"), "--json"],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # the strategy is found beside its config
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rounds"] == 2
    meta = json.loads((tmp_path / "run" / "checkpoints" / "round_000002.json").read_text())
    assert meta["num_steps"] == 2


def test_a_strategy_of_ones_own_is_examined() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "own_privacy_test" / "check_momentum.py")],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.endswith(": holds") for line in lines if line.startswith("Honest")] == [True] * 8
    assert [line for line in lines if line.startswith("Forgetful: post-processing: 'values' after round 2 (restarted")]


def test_biases_are_fine_tuned_with_example_level_privacy(tmp_path: Path) -> None:
    small = ["vocabulary.size=500", "model.d_model=16", "model.num_layers=1", "data.max_tokens_per_user=65"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "dp_finetune" / "finetune.py"), *small, f"data.cache_dir={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    base, fine_tuned, statement = done.stdout.splitlines()
    losses = [float(line.rpartition(" ")[2]) for line in (base, fine_tuned)]
    assert max(losses) < 6  # log 500 is 6.2
    assert statement.startswith("Example-level differential privacy with epsilon 8 at delta 1e-05")
    assert "NOT PRIVATE" not in statement


def test_rounds_out_of_plain_parts_have_the_bits_of_the_engine(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "one_round" / "one_round.py"), f"data.cache_dir={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout) == (0, "8,924 coordinates, 0 of them differ\n"), done.stderr
