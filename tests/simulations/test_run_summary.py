"""A run folder is read whole or refused: figures against the fixture, torn lines, broken files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import DOWN, STAMP, STATEMENT, UP, sampled, trained, write_run

from fedlm.errors import DataError
from simulations.run_files import read_run
from simulations.summary import summarise


def test_every_figure_of_a_finished_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    devices = sum(trained(i) for i in range(1, 31))
    perplexity = 228.0 + 184.3 * math.exp(-30 / 9.0)
    assert asdict(summarise(run)) == {
        "run_dir": str(run),
        "rounds": 30,
        "devices_trained": devices,
        "perplexity_initial": pytest.approx(412.3),
        "perplexity": pytest.approx(perplexity),
        "bits_per_byte": pytest.approx(math.log2(perplexity) / 5.42),
        "evaluation": {},
        "epsilon": pytest.approx(0.55 + 0.26 * math.sqrt(30)),
        "epsilon_realised": pytest.approx(1.9),
        "delta": 1e-6,
        "mechanism": "gaussian",
        "sampler": "poisson",
        "privacy_statement": STATEMENT,
        "stamps": (STAMP,),
        "example_epsilon": None,
        "example_delta": None,
        "example_statement": "",
        "example_stamps": (),
        "bytes_up_per_device": UP,
        "bytes_down_per_device": DOWN,
        "peak_device_mb": 148.3,
        "devices_per_second": pytest.approx(devices / (30 * 5.8)),
        "seconds": pytest.approx(6.9 * 30 + 18.0),
        "devices_sampled": sum(sampled(i) for i in range(1, 31)),
        "lost_by_cause": {"not enough memory": 30, "dropped out": 20},
        "virtual_hours": None,
    }


def test_realised_participation_counts_only_at_the_last_round(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "ledger.jsonl"
    assert summarise(tmp_path).shows_realised
    _edit_last(path, epsilon_realised=summarise(tmp_path).epsilon)
    assert not summarise(tmp_path).shows_realised
    # An interrupted session's figure says nothing of the rounds after it.
    _edit_last(path, epsilon_realised=1.2, round=29)
    assert summarise(tmp_path).epsilon_realised is None
    assert not summarise(tmp_path).shows_realised


@pytest.mark.parametrize("name", ["audit.json", "compare.json"])
@pytest.mark.parametrize("broken", ["", "[]", "{"])
def test_a_broken_file_beside_the_run_is_named(tmp_path: Path, name: str, broken: str) -> None:
    (write_run(tmp_path) / name).write_text(broken)
    with pytest.raises(DataError, match=name):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl"])
def test_a_line_torn_at_any_byte_is_ignored(tmp_path: Path, name: str) -> None:
    path = write_run(tmp_path, rounds=2) / name
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    start = len(whole) - len(lines[-1])
    for end in range(start, len(whole) + 1):
        path.write_bytes(whole[:end])
        record = read_run(tmp_path)
        read = record.metrics if name == "metrics.jsonl" else record.ledger
        # Without its line end alone, the object is already whole.
        assert len(read) == len(lines) - (end < len(whole) - 1)


def test_a_character_torn_in_the_middle_is_ignored(tmp_path: Path) -> None:
    path = write_run(tmp_path, rounds=2) / "ledger.jsonl"
    count = len(read_run(tmp_path).ledger)
    path.write_bytes(path.read_bytes() + '{"event": "é'.encode()[:-1])
    assert len(read_run(tmp_path).ledger) == count


@pytest.mark.parametrize("broken", ['{"round": 1, "seco', "[1]", "", "\x00\x00"])
def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path, broken: str) -> None:
    path = write_run(tmp_path, rounds=2) / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], broken, lines[2], ""]))
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2 ") as caught:
        summarise(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["config.toml", "metrics.jsonl", "ledger.jsonl"])
def test_a_folder_without_one_of_the_files_is_not_a_run(tmp_path: Path, missing: str) -> None:
    (write_run(tmp_path) / missing).unlink()
    with pytest.raises(DataError, match=f"is not a run folder .*{missing}"):
        summarise(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl"])
def test_an_empty_file_is_not_a_run(tmp_path: Path, name: str) -> None:
    (write_run(tmp_path) / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"is not a run folder .*{name}"):
        summarise(tmp_path)


def test_a_missing_folder_and_a_file_are_not_runs(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path / "absent", file):
        with pytest.raises(DataError, match="is not a run folder"):
            summarise(path)


def test_metrics_without_a_round_are_refused(tmp_path: Path) -> None:
    (write_run(tmp_path) / "metrics.jsonl").write_text('{"round": true}\n')
    with pytest.raises(DataError, match="line 1 has no integer 'round'"):
        summarise(tmp_path)


@pytest.mark.parametrize("value", [None, math.inf, math.nan])
def test_an_infinite_epsilon_is_none(tmp_path: Path, value: float | None) -> None:
    _edit_last(write_run(tmp_path) / "metrics.jsonl", epsilon=value)
    assert summarise(tmp_path).epsilon is None


def test_figures_of_the_last_evaluation_when_the_last_round_had_none(tmp_path: Path) -> None:
    _edit_last(write_run(tmp_path) / "metrics.jsonl", perplexity=None, bits_per_byte=None)
    assert summarise(tmp_path).perplexity == pytest.approx(228.0 + 184.3 * math.exp(-25 / 9.0))


def test_a_killed_run_has_the_time_of_its_last_round(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "ledger.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    summary = summarise(tmp_path)
    assert (summary.seconds, summary.peak_device_mb) == (pytest.approx(14.0 + 6.9 * 30), None)
    assert read_run(tmp_path).status == "unfinished"


def test_a_resumed_run_is_unfinished_and_keeps_the_highest_peak(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "ledger.jsonl"
    path.write_text(path.read_text() + '{"event": "resume", "round": 31}\n')
    assert read_run(tmp_path).status == "unfinished"
    end = {"event": "end", "status": "interrupted", "peak_device_mb": 90.0, "seconds": 400.0}
    path.write_text(path.read_text() + json.dumps(end) + "\n")
    assert read_run(tmp_path).status == "interrupted"
    assert (summarise(tmp_path).peak_device_mb, summarise(tmp_path).seconds) == (148.3, 400.0)


def test_a_run_before_its_first_round(tmp_path: Path) -> None:
    summary = summarise(write_run(tmp_path, rounds=0))
    assert (summary.rounds, summary.devices_trained, summary.devices_per_second) == (0, 0, 0.0)
    assert summary.perplexity == summary.perplexity_initial == pytest.approx(412.3)


def _edit_last(path: Path, **values: Any) -> None:
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps(json.loads(last) | values), ""]))
