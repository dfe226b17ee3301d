"""What the report says of privacy is true on both sides: for runs with and without raw diagnostics and DP metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from synthetic_run import write_run

from fedlm.messages import TrainReply
from server.round_lines import CohortReport
from simulations.report import write_report

RAW_WORDS = ("not private", "raw updates", "before clipping", "devices, median")
EMPTY = "This run did not measure it."


def told(norms: list[float]) -> Mapping[str, Any]:
    """Return what the engine writes of a round: its devices told their norms, or nothing."""
    report = CohortReport(3, clip_norm=1.0)
    some = np.array(norms, np.float64)
    reply = TrainReply(
        stale=False, devices=np.arange(3), non_private_norms=some, non_private_losses=some,
        failed=np.empty(0, np.int64), causes=[], peak_mb=1.0,
    )  # fmt: skip
    report.add(0, reply)
    return report.non_private()


def page(run: Path, *, raw: bool, metrics: tuple[str, ...], moving_clip: bool) -> ElementTree.Element:
    """Return the report of a run with or without each kind of figure."""
    first, *lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["non_private"] = told([0.5, 0.9, 2.0] if raw else [])
        line |= {"dp_metrics": dict.fromkeys(metrics, 0.25)} if metrics else {}
        line |= {"clip_norm": 0.3 + line["round"] * moving_clip}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (first, *lines)))
    return ElementTree.fromstring(write_report(run).read_text(encoding="utf-8"))


def words(node: ElementTree.Element) -> str:
    return " ".join(" ".join(node.itertext()).split())


@pytest.mark.parametrize(
    ("raw", "metrics", "moving_clip"),
    list(product((False, True), ((), ("train_loss",), ("train_loss", "clip_fraction")), (False, True))),
)
def test_only_figures_of_raw_updates_are_called_not_private(
    tmp_path: Path, raw: bool, metrics: tuple[str, ...], moving_clip: bool
) -> None:
    root = page(write_run(tmp_path / "run", stamps=()), raw=raw, metrics=metrics, moving_clip=moving_clip)
    for part in list(root.iter("pre")):
        part.clear()
    text = words(root)
    assert [word in text for word in RAW_WORDS] == [raw] * len(RAW_WORDS)
    boxes = [node for node in root.iter("section") if node.get("class") == "raw"]
    assert len(boxes) == raw
    assert not any("DP metric" in words(box) for box in boxes)
    titles = [words(node) for node in root.iter("h3")]
    for name in ("train_loss", "clip_fraction"):
        assert (f"DP metric {name.replace('_', ' ')} by round" in titles) == (name in metrics)
    assert "Update norms by round" in titles
    # An empty chart stands only where nothing measured what it would show.
    assert (EMPTY in text) == (not raw and "clip_fraction" not in metrics)
    heads = [words(cell) for cell in root.findall(".//thead/tr[1]/th")]
    assert ("simulation only, not private" in heads) == raw
    assert ("DP metrics" in heads) == bool(metrics)
    rows = root.findall(".//tbody/tr")
    assert {len(row) for row in rows if len(row) > 8} == {len(root.findall(".//thead/tr[2]/th"))}


def test_figures_that_nobody_measured_are_absent_and_not_none() -> None:
    assert told([]) == {}
    assert told([0.5, 0.9, 2.0]) == {
        "train_loss": pytest.approx(3.4 / 3),
        "client_norm_median": 0.9,
        "client_norm_p90": pytest.approx(1.78),
        "clip_fraction": pytest.approx(1 / 3),
    }
