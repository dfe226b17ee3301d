"""The fine-tuning study: a grid of valid configs, real processes that do a run once, one row a task and epsilon."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import pytest

from fedlm.config import load_config
from simulations.studies import finetune_study as study

DATA = Path("corpora")
ARTICLE = " = Article {} = \n" + "the people of the time have been good to the other one\n" * 3
TINY = (
    "finetune.epochs=1", "finetune.batch_size=10", "finetune.max_length=24", "data.sequence_length=24",
    "vocabulary.size=600", "model.d_model=16", "model.num_layers=1", "pretrain.max_seconds=2", "pretrain.negatives=100",
    "loss.negatives=100", "trainable.embedding_rows.count=0", "finetune.samples=0",
)  # fmt: skip


def grid(*words: str, data: Path = DATA) -> list[study.FinetuneJob]:
    return list(study.grid(study._parser().parse_args([str(data), *words])))


def test_every_run_of_the_grid_is_a_valid_config_of_its_own() -> None:
    jobs = grid()
    num_variants = sum(len(variants) for variants in study.VARIANTS.values())
    assert len(jobs) == num_variants * 3 * 3
    assert len({job.key for job in jobs}) == len(jobs)


def test_a_run_is_private_at_its_epsilon_or_not_at_all() -> None:
    for job in grid("--seeds", "1"):
        example_dp = load_config(job._recipe, job.overrides).finetune.example_dp
        assert (example_dp.enabled, example_dp.epsilon) == (bool(job.epsilon), job.epsilon)


def test_a_result_does_not_depend_on_where_the_corpora_lie() -> None:
    here, there = grid("--seeds", "1"), grid("--seeds", "1", data=Path("elsewhere"))
    assert [job.key for job in here] == [job.key for job in there]
    assert all(str(Path("elsewhere").resolve()) in " ".join(job.arguments) for job in there)


def write_corpora(data: Path) -> None:
    pairs = [f"{word},the {word} is {word}" for word in ("red", "blue", "green", "white")]
    texts = {
        "e2e/trainset.csv.xz": "mr,ref\n" + "\n".join(pairs * 10) + "\n",
        "e2e/devset.csv.xz": "mr,ref\n" + "\n".join(pairs) + "\n",
        "wikitext2/wiki.train.tokens.xz": "".join(ARTICLE.format(i) for i in range(40)),
    }
    for name, text in texts.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(lzma.compress(text.encode()))


def test_a_run_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpora(tmp_path)
    monkeypatch.setitem(study.SIZES, "e2e", TINY)
    monkeypatch.setitem(study.VARIANTS, "e2e", {"bitfit": study.VARIANTS["e2e"]["bitfit"]})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    results = tmp_path / "lines.jsonl"
    words = [str(tmp_path), "--tasks", "e2e", "--epsilons", "0", "--seeds", "1", "--jobs", "1"]
    assert study.main([*words, "--results", str(results)]) == 0
    (line,) = study.read_results(results).values()
    assert (line["num_examples"], line["steps"], line["epsilon"]) == (40, 4, None)
    assert str(tmp_path) not in results.read_text()
    before = results.read_bytes()
    assert study.main([*words, "--results", str(results)]) == 0
    assert results.read_bytes() == before
    tables = capsys.readouterr().out.split("| task")[1:]
    assert tables[0] == tables[1]
    assert "| e2e | bitfit | " in tables[0]
    assert f"{line['perplexity']:.4g}" in tables[0]


def test_an_absent_corpus_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "lines.jsonl"
    words = [str(tmp_path / "absent"), "--tasks", "e2e", "--epsilons", "0", "--seeds", "1", "--results", str(results)]
    assert study.main(words) != 0
    error = capsys.readouterr().err
    assert "absent" in error
    assert "Traceback" not in error
    assert not results.exists()


def test_a_row_is_the_mean_over_seeds_and_its_error() -> None:
    jobs = grid("--tasks", "sst2", "--epsilons", "8")
    figures = {1: 0.80, 2: 0.82, 3: 0.84}
    lines: dict[str, dict[str, Any]] = {
        job.key: {"num_trained": 1234, "accuracy": figures[job.seed], "accuracy_initial": 0.5, "seconds_per_step": 2.0}
        for job in jobs
        if job.variant == "bitfit" or (job.variant == "lora" and job.seed == 2)
    }
    lora, bitfit = list(study.table(jobs, lines))[2:]
    assert lora == "| sst2 | lora | 1,234 | 8 | accuracy | 0.5 | 0.82 | 1 | 2.00 |"
    # Standard deviation 0.02, its root of three seeds 0.0115.
    assert bitfit == "| sst2 | bitfit | 1,234 | 8 | accuracy | 0.5 | 0.82 ± 0.012 | 3 | 2.00 |"
