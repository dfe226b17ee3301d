"""The privacy parts of the report: figures against a plan that really releases, and against their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from synthetic_run import write_run

from fedlm.config.schema import PrivacyConfig
from fedlm.errors import DataError
from fedlm.privacy.clipping.clipped_sum import new_sum
from fedlm.privacy.plan import PrivacyPlan
from fedlm.trainable.spec import UpdateSpec
from simulations.report import write_report
from simulations.report.releases import noise_norms
from simulations.run_files import read_run
from simulations.which_mechanism import compare_run

SIZES = {"lora_a": 4_000, "lora_b": 9_000, "rows": 20_000}
BLOCKS = [{"kind": kind, "name": kind, "bytes": 4 * size} for kind, size in SIZES.items()]
VIEW = {
    "name": "hidden",
    "sees": "to who sees <all> releases",
    "accounted": 2.0001,
    "gaussian": {"num_canaries": 98, "epsilon": 1.9, "low": 1.1, "high": 2.6, "at_least": 0.8},
    "one_run": {"epsilon": 0.4},
    "one_run_at_least": 0.9,
}
AUDIT: dict[str, Any] = {"views": [VIEW], "text": None, "notes": ["a note"], "alarms": []}


def plan_of(**privacy: Any) -> PrivacyPlan:
    fields = {"clip_norm": 0.5, "epsilon": 3.0, "delta": 1e-6, "population": 0, "expected_cohort": 0} | privacy
    moments = {"lora_a": 1.0, "lora_b": 20.0, "rows": 0.1}
    asked = moments if fields.get("allocation") in ("public", "per_group") else None
    return PrivacyPlan.create(PrivacyConfig(**fields), rounds=6, fleet_size=2_000, cohort=100, seed=1, moments=asked)


def spec() -> UpdateSpec:
    return UpdateSpec.build([(kind, kind, (size,)) for kind, size in SIZES.items()])  # type: ignore[misc]


def change_lines(run: Path, name: str = "metrics.jsonl", **values: Any) -> None:
    """Give each line but the first the values; functions of its round are called."""
    first, *lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    for line in lines:
        line |= {key: value(line["round"]) if callable(value) else value for key, value in values.items()}
    (run / name).write_text("".join(json.dumps(line) + "\n" for line in (first, *lines)))


def words(node: ElementTree.Element) -> str:
    return " ".join(" ".join(node.itertext()).split())


def page(run: Path) -> ElementTree.Element:
    return ElementTree.fromstring(write_report(run).read_text(encoding="utf-8"))


def charts(root: ElementTree.Element) -> dict[str, str]:
    return {words(svg[0]): words(svg) for svg in root.iter("svg")}


@pytest.mark.parametrize(
    "privacy",
    [
        {},
        {"population": 20_000, "expected_cohort": 1_000},
        {"clip_quantile": 0.5, "metrics": ("train_loss",)},
        {"allocation": "public"},
        {"allocation": "per_group"},
        {"allocation": "adaptive"},
        {"mechanism": "blt"},
        {"mechanism": "banded"},
        {"mechanism": "local", "epsilon": 8.0},
    ],
)
def test_the_noise_shown_is_the_noise_released(tmp_path: Path, privacy: dict[str, Any]) -> None:
    plan, run = plan_of(**privacy), write_run(tmp_path, rounds=6, start={"blocks": BLOCKS, "clip_norm": 0.5})
    (run / "plan.json").write_text(plan.to_json())
    released, state = {}, plan.first_state(spec())
    for t in range(1, 7):
        total = new_sum(plan.clip_spec(state, spec(), t), spec().size)
        released[t] = float(np.linalg.norm(plan.release(total, t).mean))  # nobody took part: nothing but noise
    scales = {"scales": list(state.allocation.scales)} if state.allocation else {}
    change_lines(run, clip_norm=0.5, devices=0, update_norm=lambda t: released[t], **scales)
    assert noise_norms(read_run(run)) == pytest.approx(released, rel=0.03)
    assert "Signal and noise by round" in charts(page(run))


@pytest.mark.parametrize("plan", [None, "{}", "no json"])
def test_without_a_plan_of_this_version_there_is_no_noise_to_show(tmp_path: Path, plan: str | None) -> None:
    run = write_run(tmp_path)
    if plan is not None:
        (run / "plan.json").write_text(plan)
    assert noise_norms(read_run(run)) == {}
    assert "Signal and noise by round" not in charts(page(run))


def test_a_clip_norm_that_moves_is_a_line_and_one_that_stays_a_level(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    change_lines(run, clip_norm=0.3)
    assert "clip norm 0.3" in charts(page(run))["Update norms by round"]
    change_lines(run, clip_norm=lambda t: 0.3 + t / 100)
    chart = charts(page(run))["Update norms by round"]
    assert "clip norm ends at 0.6" in chart
    assert "clip norm 0.3 " not in chart.replace("clip norm 0.31", "")


def test_scales_and_dp_metrics_have_charts_where_there_are_any(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert not any("cale" in title or "DP" in title for title in charts(page(run)))
    change_lines(run, scales=lambda t: [1.0, 1 + t / 10, 0.5], dp_metrics=lambda t: {"train_loss": 5 + t, "x": None})
    found = charts(page(run))
    assert "LoRA, factors B ends at 4" in found["Scales by round"]
    assert "private 35" in found["DP metric train loss by round"]
    assert "not private 4.3" in found["DP metric train loss by round"]
    assert "DP metric x by round" not in found  # never finite
    heads = [words(cell) for cell in page(run).findall(".//thead/tr[2]/th")]
    assert heads.count("train loss") == 2
    raw = words(next(node for node in page(run).iter("section") if node.get("class") == "raw"))
    assert "DP metric" not in raw  # it left the devices with noise, and is no raw figure


def test_planned_and_realised_epsilon_stand_side_by_side(tmp_path: Path) -> None:
    text = words(page(write_run(tmp_path)))
    assert "epsilon 1.975 at delta 1e-6, planned; realised 1.9" in text
    assert "most participations realised 7" in text
    assert "every device flips its own coin" in text


def test_an_audit_has_its_table_and_its_alarm(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "audit.json").write_text(json.dumps(AUDIT))
    section = next(node for node in page(run).iter("section") if words(node).startswith("Audit"))
    cells = [words(cell) for cell in section.findall(".//tbody/tr/td")]
    assert cells == ["to who sees <all> releases", "2.001", "1.9", "1.1 to 2.6", "0.9", "0.4", "98"]
    assert "found nothing against" in words(section)
    (run / "audit.json").write_text(json.dumps(AUDIT | {"alarms": ["ALARM: less private"]}))
    assert "ALARM: less private" in words(page(run))
    (run / "audit.json").write_text(json.dumps(AUDIT | {"views": [{}]}))
    with pytest.raises(DataError, match=r"audit\.json is not what"):
        write_report(run)


def test_compared_mechanisms_have_a_section_that_marks_the_run(tmp_path: Path) -> None:
    plan, run = plan_of(mechanism="blt", min_separation=3), write_run(tmp_path, rounds=6)
    (run / "plan.json").write_text(plan.to_json())
    found = compare_run(run, epsilons=[8.0], max_vectors=1)
    assert json.loads((run / "compare.json").read_text()) == found.to_fields()
    assert sorted({row.epsilon for row in found.rows}) == [3.0, 8.0]
    (twin,) = [row for row in found.rows if row.epsilon == 3.0 and row.mechanism == "blt (2 buffers)"]
    assert found.own["prefix_rmse"] == pytest.approx(twin.prefix_rmse)  # the run's own separation, not the widest
    root = ElementTree.fromstring((run / "report.html").read_text(encoding="utf-8"))
    section = next(node for node in root.iter("section") if words(node).startswith("Which mechanism"))
    assert len(section.findall(".//tbody/tr")) == len(found.rows)
    assert section.findall(".//circle[@class='ring']")
    assert "This run is marked (blt" in words(section)
    assert not [path.name for path in run.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("broken", [{}, {"rows": [], "advice": [], "run": {"epsilon": 1, "prefix_rmse": 1}}])
def test_a_broken_comparison_is_an_error_that_names_it(tmp_path: Path, broken: dict[str, Any]) -> None:
    (write_run(tmp_path) / "compare.json").write_text(json.dumps(broken))
    with pytest.raises(DataError, match=r"compare\.json is not what"):
        write_report(tmp_path)


def test_a_run_without_privacy_has_nothing_to_compare(tmp_path: Path) -> None:
    run = write_run(tmp_path, rounds=6, private=False)
    (run / "plan.json").write_text(plan_of(enabled=False).to_json())
    with pytest.raises(DataError, match="without privacy"):
        compare_run(run)
