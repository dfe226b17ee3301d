"""Ctrl-C and SIGTERM at the awkward moments: exit code 130, one line, no half-written file, no process left."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from tiny_fedlm import Done, command, environment, one_line


def num_rounds(ledger: Path) -> int:
    return ledger.read_text(encoding="utf-8").count('"event": "round"') if ledger.exists() else 0


def wait_for(mark: str, rounds: int, error: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a process has said `mark` on standard error, and the ledger beside it holds that many rounds."""
    deadline = time.monotonic() + 120
    while mark not in error.read_text() or num_rounds(error.parent / "run" / "ledger.jsonl") < rounds:
        assert process.poll() is None, error.read_text()
        assert time.monotonic() < deadline, error.read_text()
        time.sleep(0.02)


def interrupt_at(
    words: list[str], folder: Path, mark: str, number: signal.Signals = signal.SIGINT, *, rounds: int = 0
) -> Done:
    """Run a command, interrupt it once its progress says `mark` and the ledger of `run` holds that many rounds, and
    wait until it and its children are gone.
    """
    error = folder / "error.txt"
    with error.open("w", encoding="utf-8") as stream, subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=stream, cwd=folder, env=environment(), text=True
    ) as process:  # fmt: skip
        try:
            wait_for(mark, rounds, error, process)
        except AssertionError:
            process.kill()
            raise
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    gone, alive = psutil.wait_procs(children, timeout=90)
    assert alive == [], f"{len(gone)} ended"
    lines = [line for line in error.read_text().splitlines(keepends=True) if line.startswith("fedlm: error")]
    assert error.read_text().endswith(lines[-1])
    assert "Traceback" not in error.read_text()
    return Done(process.returncode, out, lines[-1], folder / "run")


def test_during_pretraining(tiny: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    words = ["simulate", str(tiny), "--out", "run", "--set", f"data.cache_dir={cache}", "--set", "pretrain.epochs=200"]
    done = interrupt_at(words, tmp_path, "pretraining")
    one_line(done, 130, "interrupted")
    assert not done.folder.exists()
    assert list((cache / "bases").iterdir() if (cache / "bases").exists() else []) == []


def test_sigterm_leaves_a_run_that_can_be_resumed(tiny: Path, tmp_path: Path) -> None:
    settings = ["--set", "rounds=2000", "--set", "execution.eval_every=0", "--set", "execution.checkpoint_every=9999"]
    words = ["simulate", str(tiny), "--out", "run", *settings]
    last = 0
    for command_words in (words, ["resume", "run"]):
        done = interrupt_at(command_words, tmp_path, "round ", signal.SIGTERM, rounds=last + 1)
        one_line(done, 130, "continue with `fedlm resume run`")
        end = done.lines("ledger.jsonl")[-1]
        assert end["status"] == "interrupted"
        assert end["round"] > last
        last = end["round"]
        assert (done.folder / "checkpoints" / f"round_{last:06d}.json").exists()


FINETUNE = [
    "model.base=random", "trainable.dense=['*']", "trainable.lora.rank=0", "trainable.embedding_rows.count=0",
    "loss.kind=full_softmax", "finetune.train=train.txt", "finetune.max_length=16", "finetune.epochs=5000",
    "finetune.batch_size=10", "finetune.example_dp.noise_multiplier=1",
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "settings", "mark", "says"),
    [
        (["pretrain"], ["pretrain.epochs=200", "data.cache_dir=cache"], "pretraining", "interrupted"),
        (["finetune", "--out", "run"], FINETUNE, "step ", "interrupted after step"),
        (["audit", "--canaries", "5", "--out", "run"], ["rounds=2000"], "round ", "fedlm resume run"),
    ],
)
def test_sigterm_ends_every_verb_that_trains(
    tiny: Path, tmp_path: Path, words: list[str], settings: list[str], mark: str, says: str
) -> None:
    (tmp_path / "train.txt").write_text("the cat sat on the mat\nthe dog ran\n" * 20, encoding="utf-8")
    overrides = [word for setting in settings for word in ("--set", setting)]
    done = interrupt_at([words[0], str(tiny), *words[1:], *overrides], tmp_path, mark, signal.SIGTERM)
    one_line(done, 130, says)


@pytest.mark.parametrize("mark", ["opening", "round "])
def test_with_ray(tiny: Path, tmp_path: Path, mark: str) -> None:
    words = ["simulate", str(tiny), "--out", "run", "--set", "execution.grid=ray", "--set", "execution.workers=1"]
    done = interrupt_at([*words, "--set", "rounds=2000", "--set", "execution.eval_every=0"], tmp_path, mark)
    assert done.code == 130
    if mark == "opening":  # before the run folder exists there is nothing to resume
        one_line(done, 130, "interrupted")
    else:
        one_line(done, 130, "continue with `fedlm resume run`")
        assert done.lines("ledger.jsonl")[-1]["status"] == "interrupted"
        assert not list(done.folder.rglob("*.tmp"))
