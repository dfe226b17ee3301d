"""The Re-Attention study: keys of its runs, a tiny run done once, and differences by seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulations.studies import re_attention_study as study

TINY = study.Sizes(
    vocabulary=2_100, length=8, d_model=8, num_layers=1, num_heads=1, negatives=50, num_examples=40, num_test=20,
    batch_size=10, steps=3, base_epochs=1,
)  # fmt: skip
JOB = study.ReAttentionJob("off", 5.0, 1, "train.txt", Path("folder") / "public.txt", TINY)


def test_every_run_is_a_valid_config_of_its_own() -> None:
    jobs = [replace(JOB, variant=v, epsilon=e, seed=s) for v in study.VARIANTS for e in (5.0, 8.0) for s in (1, 2)]
    jobs += [replace(JOB, corpus="other.txt"), replace(JOB, sizes=replace(TINY, steps=4))]
    for job in jobs:
        config = study.settings(job)
        assert (config.seed, config.model.re_attention) == (job.seed, job.variant)
    assert len({job.key for job in jobs}) == len(jobs)


def test_a_result_does_not_depend_on_where_the_texts_lie() -> None:
    assert JOB.key == replace(JOB, public=Path("elsewhere") / "public.txt").key
    assert JOB.key != replace(JOB, public=Path("folder") / "others.txt").key


def test_a_run_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = np.random.default_rng(1).choice(
        ["the", "people", "of", "time", "have", "been", "good", "other"], (40, 3, 12)
    )
    articles = "".join(" = Article = \n" + "".join(" ".join(row) + "\n" for row in part) for part in words)
    for name in ("train.tokens", "test.tokens", "public.tokens"):
        (tmp_path / name).write_text(articles)
    results = tmp_path / "lines.jsonl"
    sizes = [f"{name}={value}" for name, value in vars(TINY).items()]
    arguments = [str(tmp_path / name) for name in ("train.tokens", "test.tokens", "public.tokens")]
    arguments += ["--epsilons", "5", "--seeds", "1", "--results", str(results), "--size", *sizes]
    assert study.main(arguments) == 0
    lines = study.read_results(results)
    assert [line["variant"] for line in lines.values()] == list(study.VARIANTS)
    assert all(0 < line["epsilon"] <= 5 * (1 + 1e-4) for line in lines.values())
    assert all(len(line["accuracy_at_10_deciles"]) == study.NUM_DECILES for line in lines.values())
    before = results.read_bytes()
    assert study.main(arguments) == 0
    assert results.read_bytes() == before
    tables = capsys.readouterr().out.split("| epsilon")[1:]
    assert tables[0] == tables[1]
    assert f"{lines[next(iter(lines))]['perplexity']:.1f}" in tables[0]


def line(perplexity: float, rare: float) -> dict[str, Any]:
    return {
        "perplexity": perplexity,
        "accuracy_at_1": 0.1,
        "accuracy_at_10": 0.2,
        "accuracy_at_10_deciles": [0.9] * 5 + [rare / 100] * 5,
    }


def test_differences_are_taken_by_seed() -> None:
    jobs = [replace(JOB, variant=variant, seed=seed) for seed in (1, 2, 3) for variant in ("off", "absolute")]
    figures = {
        "off": {1: (200.0, 1.0), 2: (220.0, 1.0), 3: (240.0, 2.0)},
        "absolute": {1: (190.0, 2.0), 3: (236.0, 4.0)},
    }
    lines = {job.key: line(*figures[job.variant][job.seed]) for job in jobs if job.seed in figures[job.variant]}
    off, absolute = list(study.table(jobs, lines))[2:]
    assert off == "| 5 | off | 220.0 | - | 10.00 | 20.00 | 1.333 | - |"
    # Seeds 1 and 3 are in both: -10 and -4, mean -7, standard error 3; 1 and 2, mean 1.5, error 0.5.
    assert absolute == "| 5 | absolute | 213.0 | -7.00 ± 3.00 | 10.00 | 20.00 | 3.000 | +1.500 ± 0.500 |"


def test_unknown_sizes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.main(["a", "b", "c", "--size", "widht=3"])
    assert "'widht' is no size" in capsys.readouterr().err
