"""Run folders as users treat them: resumed, reported, compared, damaged, named wrongly, copied half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_fedlm import Done, Fedlm, one_line


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A finished run; tests copy it."""
    from fedlm.config.load import load_config
    from simulations.run import simulate

    folder = tmp_path_factory.mktemp("finished") / "run"
    simulate(load_config(tiny), folder, lambda event: None)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_every_verb_that_reads_runs_prints_one_object(fedlm: Fedlm, run: Path) -> None:
    before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    resumed = fedlm("resume", "run", "--json", "--quiet")
    assert resumed.summary["rounds"] == 2
    assert resumed.error == ""
    assert resumed.lines("metrics.jsonl") == before  # a finished run stays as it is
    assert fedlm("report", "run", "--json").summary == {"report": "run/report.html"}
    rows = fedlm("compare", "run", run, "--json").summary["runs"]
    assert [row["perplexity"] for row in rows] == [before[-1]["perplexity"]] * 2


@pytest.mark.parametrize("verb", ["resume", "report", "compare"])
@pytest.mark.parametrize("name", ["nothing", "empty", "file"])
def test_what_is_no_run_is_refused(fedlm: Fedlm, tmp_path: Path, verb: str, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    one_line(fedlm(verb, name), 2, f"{name} is not a run folder", "give")


@pytest.mark.parametrize("out", ["run", "file", "file/run"])
def test_a_folder_with_something_in_it_is_not_written_to(fedlm: Fedlm, tmp_path: Path, tiny: Path, out: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    one_line(fedlm("simulate", tiny, "--out", out), 1, out, "choose another --out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine.txt", "run"]


def test_a_half_written_run_has_a_report_as_soon_as_it_has_a_figure(fedlm: Fedlm, run: Path) -> None:
    for name, kept in (("metrics.jsonl", 1), ("ledger.jsonl", 2)):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(lines[:kept]) + lines[kept][:20])  # and a torn line
    (run / "report.html").unlink()
    assert fedlm("report", "run").code == 0
    assert "</html>" in (run / "report.html").read_text()
    (run / "metrics.jsonl").write_text("")
    one_line(fedlm("report", "run"), 2, "no complete line yet")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("checkpoints/round_000002.safetensors", ["is damaged", "resume from the one before"]),
        ("checkpoints/round_000002.json", ["is damaged", "resume from the one before"]),
        ("plan.json", ["stored privacy plan", "restore"]),
        ("config.toml", ["broken TOML"]),
    ],
)
def test_a_damaged_file_is_named(fedlm: Fedlm, run: Path, name: str, parts: list[str]) -> None:
    (run / name).write_text("{")
    one_line(fedlm("resume", "run", "--quiet"), 2, *parts)


def test_without_its_last_checkpoint_a_run_continues_from_the_one_before(fedlm: Fedlm, run: Path) -> None:
    perplexity = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["perplexity"]
    for file in (run / "checkpoints").glob("round_000002.*"):
        file.unlink()
    resumed: Done = fedlm("resume", "run", "--json", "--quiet")
    assert resumed.summary["perplexity"] == perplexity  # the journal has the releases: no new noise
    assert resumed.summary["rounds"] == 2
