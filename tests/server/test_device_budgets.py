"""A device whose own budget is spent stays away; the two guarantees of a run are stated apart."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from tiny_private_runs import TINY, quiet

from fedlm.config.load import load_config
from simulations.run import simulate

MOST = 2
EXAMPLE_DP = (
    "local.example_dp.enabled=true", "local.example_dp.epsilon=6", f"local.example_dp.max_rounds={MOST}",
    "privacy.non_private_diagnostics=false", "fleet.device_log=true", "data.corpus=synthetic", "synthetic.users=30",
    "synthetic.tokens_per_user=40", "synthetic.classes=16", "vocabulary.size=300", "loss.negatives=32",
    "pretrain.negatives=64", "pretrain.epochs=1", "execution.products=fp32", "privacy.reproducible_cohorts=true",
)  # fmt: skip


def test_no_device_trains_in_more_rounds_than_its_budget_lasts(tmp_path: Path) -> None:
    summary = simulate(load_config(None, [*TINY, *EXAMPLE_DP]), tmp_path / "run", quiet)
    with (tmp_path / "run" / "devices.csv").open() as file:
        rows = list(csv.DictReader(file))
    sampled, trained = (
        Counter(row["device"] for row in rows if wanted(row["outcome"])) for wanted in (bool, is_training)
    )
    assert max(sampled.values()) > MOST
    assert max(trained.values()) == MOST
    assert all(trained[device] == min(count, MOST) for device, count in sampled.items())
    assert summary.lost_by_cause == {"own budget spent": sum(max(0, count - MOST) for count in sampled.values())}
    assert summary.example_epsilon is not None
    assert 5.9 < summary.example_epsilon <= 6.001
    assert "one training sequence" in summary.example_statement
    assert "one training sequence" not in summary.privacy_statement
    assert summary.example_statement in (tmp_path / "run" / "report.html").read_text()


def is_training(outcome: str) -> bool:
    return outcome == "trains"
