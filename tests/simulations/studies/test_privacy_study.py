"""The study's grid is made of valid configs; real processes do a run once; the table's differences go by seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlm.errors import ConfigError, DataError
from simulations.studies import privacy_study as study
from simulations.studies.study import append_result

CORPUS = Path("folder") / "users.jsonl"
TINY = """
rounds = 2
[data]
public_fraction = 0.3
sequence_length = 8
[vocabulary]
size = 500
[model]
d_model = 8
d_ff = 8
num_layers = 1
num_heads = 1
[pretrain]
epochs = 1
negatives = 16
[trainable.lora]
rank = 1
[trainable.embedding_rows]
sampler = "top_k"
count = 20
[loss]
negatives = 8
[fleet]
cohort = 5
[execution]
grid = "inprocess"
products = "fp32"
"""


def test_every_run_of_the_grid_is_a_valid_config_of_its_own() -> None:
    jobs = list(study.grid(CORPUS, [2.0, 8.0], [1, 2, 3], []))
    noisy = len(study.VARIANTS) - 1
    assert len(jobs) == 3 + noisy * 2 * 3
    assert len({job.key for job in jobs}) == len(jobs)


def test_a_variant_that_is_no_config_is_refused_before_any_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(study.VARIANTS, "wrong", ("privacy.mechanism=none",))
    with pytest.raises(ConfigError, match=r"privacy\.mechanism"):
        _ = study.PrivacyJob("wrong", 2.0, 1, CORPUS).key


def test_a_result_belongs_to_a_corpus_by_its_name_alone() -> None:
    job = study.PrivacyJob("blt", 2.0, 1, CORPUS)
    assert job.key == study.PrivacyJob("blt", 2.0, 1, Path("elsewhere") / CORPUS.name).key
    assert job.key != study.PrivacyJob("blt", 2.0, 1, CORPUS.with_name("others.jsonl")).key


def test_a_run_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, corpus, results = tmp_path / "tiny.toml", tmp_path / "users.jsonl", tmp_path / "results" / "lines.jsonl"
    recipe.write_text(TINY)
    text = "the people of the time have been good to the other one and all of them know it well"
    users = [{"user": f"u{i}", "split": "eval" if i < 4 else "train", "texts": [text] * 2} for i in range(40)]
    corpus.write_text("".join(json.dumps(user) + "\n" for user in users))
    monkeypatch.setattr(study, "RECIPE", recipe)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = [str(corpus), "--only", "noiseless", "--seeds", "1", "--jobs", "1", "--results", str(results)]
    assert study.main(words) == 0
    (line,) = study.read_results(results).values()
    assert line["rounds"] == 2
    assert line["perplexity"] > 1
    assert str(tmp_path) not in results.read_text()
    before = results.read_bytes()  # with the seconds that the run took: another run would not repeat them
    assert study.main(words) == 0
    assert results.read_bytes() == before
    tables = capsys.readouterr().out.split("| target")[1:]
    assert len(tables) == 2
    assert tables[0] == tables[1]
    assert f"{line['perplexity']:.1f}" in tables[0]


def test_a_run_that_fails_says_which_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent, results = tmp_path / "absent.jsonl", tmp_path / "lines.jsonl"
    assert study.main([str(absent), "--only", "noiseless", "--seeds", "1", "--results", str(results)]) != 0
    assert "absent.jsonl" in capsys.readouterr().err
    assert not results.exists()


def test_differences_are_taken_by_seed() -> None:
    jobs = [study.PrivacyJob(variant, 2.0, seed, CORPUS) for variant in ("gaussian", "blt") for seed in (1, 2, 3)]
    figures = {"gaussian": {1: 200.0, 2: 220.0, 3: 240.0}, "blt": {1: 190.0, 3: 236.0}}
    lines: dict[str, dict[str, Any]] = {
        job.key: {"perplexity": figures[job.variant][job.seed], "perplexity_initial": 300.0, "epsilon": 1.99}
        for job in jobs
        if job.seed in figures[job.variant]
    }
    gaussian, blt = list(study.table(jobs, lines))[2:]
    assert gaussian == "| 2 | gaussian | 1.99 | 220.0 | 200.0, 220.0, 240.0 | 300.0 | - |"
    # Seeds 1 and 3 are in both: -10 and -4, mean -7, standard error 3; seed 2 must not count.
    assert blt == "| 2 | blt | 1.99 | 213.0 | 190.0, 236.0 | 300.0 | -7.0 ± 3.0 |"


@pytest.mark.parametrize("broken", ["{", "[]", '{"variant": "blt"}', "3"])
def test_a_line_that_is_no_result_is_named(tmp_path: Path, broken: str) -> None:
    file = tmp_path / "lines.jsonl"
    append_result(file, {"key": "abc"})
    file.write_text(file.read_text() + broken + "\n")
    with pytest.raises(DataError, match="line 2"):
        study.read_results(file)
