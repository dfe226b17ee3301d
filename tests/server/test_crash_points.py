"""A kill at any write of a run folder: resumed it has the same bits, and never two releases of one round on disk.

A kill -9 leaves the files as they are between two file operations, or in the middle of a write. So one run, watched at
every operation, shows every state that a kill can leave: they are copied, and each copy is resumed as a run of its own.
"""

from __future__ import annotations

import builtins
import functools
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tiny_private_runs import TINY, lines, quiet

import fedlm.data.vocabulary
from fedlm.config.schema import Config
from fedlm.errors import DataError
from server.run_folder import CONFIG, PLAN, RunFolder
from simulations.run import resume, simulate

Make = Callable[..., Config]
Watch = Callable[[], None]

ROUNDS = 3
TINIEST = (
    *TINY, f"rounds={ROUNDS}", "fleet.cohort=4", "execution.checkpoint_every=2", "data.max_eval_tokens=100",
    "trainable.embedding_rows.sampler=top_k", "privacy.mechanism=blt", "fleet.device_log=true",
)  # fmt: skip
FRESH = ("privacy.reproducible_noise=false",)


class _Stream:
    """A file that is being written: what was written is on disk at once, and half of it a moment earlier."""

    def __init__(self, stream: Any, watch: Watch) -> None:
        self._stream, self._watch = stream, watch

    def write(self, data: Any) -> int:
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._watch()
            self._stream.write(part)
            self._stream.flush()
        return len(data)

    def truncate(self, size: int) -> None:
        self._watch()
        self._stream.truncate(size)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stream)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def watched(folder: Path, watch: Watch) -> Iterator[None]:
    """Call `watch` before every operation that may change the folder, in the middle of writes, and at the end."""
    descriptors: set[int] = set()

    def is_ours(file: Any) -> bool:
        if isinstance(file, int):
            return file in descriptors
        return Path(os.fsdecode(file)).absolute().is_relative_to(folder)

    def opened(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if not is_ours(file) or mode in ("r", "rb"):
            return real_open(file, mode, *rest, **named)
        watch()
        return _Stream(real_open(file, mode, *rest, **named), watch)

    def os_opened(file: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and is_ours(file):
            watch()
            descriptors.add(descriptor := real["open"](file, flags, *rest, **named))
            return int(descriptor)
        descriptors.discard(descriptor := real["open"](file, flags, *rest, **named))
        return int(descriptor)

    def changing(name: str) -> Callable[..., Any]:
        def changed(file: Any, *rest: Any, **named: Any) -> Any:
            if is_ours(file):
                watch()
            return real[name](file, *rest, **named)

        return changed

    real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "rename", "unlink", "remove", "mkdir")}
    real_open = io.open
    with pytest.MonkeyPatch.context() as patch:
        for name in real.keys() - {"open"}:
            patch.setattr(os, name, changing(name))
        patch.setattr(os, "open", os_opened)
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        yield
    watch()


class Kills:
    """Copies every state of a run folder that a kill can leave, each once.

    Arguments:
        run: The run folder.
        copies: Where the copies go.
    """

    def __init__(self, run: Path, copies: Path) -> None:
        self._run, self._copies = run, copies
        self._seen: set[bytes] = set()
        self.states: list[Path] = []

    def __call__(self) -> None:
        """Copy the folder unless it was in this state before."""
        files = sorted(file for file in self._run.rglob("*") if file.is_file())
        texts = [b"%s\0%s" % (str(file).encode(), sha256(file.read_bytes()).digest()) for file in files]
        state = b"\0".join(texts)
        if state not in self._seen and self._run.exists():
            self._seen.add(state)
            self.states.append(self._copies / f"{len(self.states):03d}" / "run")
            shutil.copytree(self._run, self.states[-1])
            for file in self.states[-1].rglob(f"*.{os.getpid()}.tmp"):  # its writer is not the one that resumes
                file.rename(file.with_name(file.name.replace(f".{os.getpid()}.tmp", ".1.tmp")))


@pytest.fixture(autouse=True)
def _words_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public word list is the same for all of these runs and takes most of the time of opening one."""
    count = functools.cache(fedlm.data.vocabulary.public_word_frequencies)
    monkeypatch.setattr(fedlm.data.vocabulary, "public_word_frequencies", count)


def final(run: Path) -> dict[str, Any]:
    return load_file(run / "checkpoints" / f"round_{ROUNDS:06d}.safetensors")


def told(run: Path) -> tuple[list[Any], list[Any], str]:
    """Return what a run has told of its rounds, without times."""
    timed = ("seconds", "round_seconds", "time")
    metrics, ledger = (
        [{k: v for k, v in line.items() if k not in timed} for line in lines(run, name)]
        for name in ("metrics.jsonl", "ledger.jsonl")
    )
    return metrics, [line for line in ledger if "round" in line and line["event"] == "round"], log_of(run)


def log_of(run: Path) -> str:
    return (run / "devices.csv").read_text(encoding="utf-8")


def resume_from(state: Path) -> bool:
    """Resume a copied state; False if it was not yet a run folder, and then nothing was released."""
    if not all((state / name).is_file() for name in (CONFIG, PLAN)):
        with pytest.raises(DataError, match="not a run folder"):
            resume(state, quiet)
        assert not any((state / "journal").glob("*"))
        return False
    resume(state, quiet)
    return True


def test_a_run_killed_at_any_write_resumes_to_the_same_bits(small: Make, tmp_path: Path) -> None:
    """And the resumed run may be killed at any write too."""
    run = tmp_path / "run"
    kills = Kills(run, tmp_path / "killed")
    with watched(run, kills):
        simulate(small(*TINIEST), run, quiet)
    assert len(kills.states) > 50
    torn = next(state for state in kills.states if _half_a_release(state, round_number=2))
    again = Kills(torn, tmp_path / "killed_again")
    shutil.copytree(torn, tmp_path / "torn")
    with watched(torn, again):
        resume(torn, quiet)
    resumed = [state for state in [*kills.states, *again.states, tmp_path / "torn"] if resume_from(state)]
    assert len(resumed) > 80
    for state in resumed:
        assert told(state) == told(run), state
        mine, theirs = final(state), final(run)
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs), state
        assert not [file for file in state.rglob("*.tmp") if not file.name.startswith(".report.")], state
        assert not (state / "noise_keys").exists()


def test_never_two_releases_of_one_round_are_on_disk(small: Make, tmp_path: Path) -> None:
    """With fresh noise: what a kill has left of a release is the release, or gone before another is begun."""
    run = tmp_path / "run"
    kills = Kills(run, tmp_path / "killed")
    with watched(run, kills):
        simulate(small(*TINIEST, *FRESH), run, quiet)
    states = [state for state in kills.states if _being_released(state)]
    assert len(states) >= 3 * ROUNDS  # empty, half, whole
    num_adopted = 0
    for state in states:
        [left] = _being_released(state)
        whole = _mean(left)
        kept: dict[str, Any] = {}

        def watch(state: Path = state, kept: dict[str, Any] = kept) -> None:
            files = [file for file in (state / "journal").iterdir() if file.name.strip(".").startswith("round_")]
            rounds = [file.name.strip(".").partition(".")[0] for file in files]
            assert len(set(rounds)) == len(rounds), sorted(file.name for file in files)
            kept.update({file.stem: _mean(file) for file in files if not file.name.startswith(".")})

        with watched(state, watch):
            resume(state, quiet)
        if whole is not None:
            assert np.array_equal(kept[left.name[1:].partition(".")[0]], whole)
            num_adopted += 1
    assert num_adopted == ROUNDS


def _being_released(state: Path) -> list[Path]:
    return list((state / "journal").glob(".round_*.tmp")) if (state / "journal").is_dir() else []


def _half_a_release(state: Path, *, round_number: int) -> bool:
    return any(
        file.name.startswith(f".round_{round_number:06d}") and file.stat().st_size and _mean(file) is None
        for file in _being_released(state)
    )


def _mean(file: Path) -> Any:
    """Return what a file releases; None of a torn one."""
    try:
        return load_file(file)["mean"]
    except SafetensorError:
        return None


def test_a_release_that_lost_its_content_with_the_power_is_not_adopted(tmp_path: Path) -> None:
    """The length of a file may reach the disk before its content does."""
    folder = RunFolder.create(tmp_path / "run", {CONFIG: "", PLAN: ""}, bytes_needed=0)
    folder.write_release(1, {"mean": np.ones(1000, np.float32)}, {"metrics": {}, "ledger": []})
    [file] = (folder.path / "journal").iterdir()
    data = file.read_bytes()
    temporary = file.with_name(f".{file.name}.77.tmp")
    for content, adopted in ((data, True), (data[:-400] + bytes(400), False), (data[:-1], False), (b"", False)):
        file.unlink(missing_ok=True)
        temporary.write_bytes(content)
        with folder.locked():
            assert not temporary.exists()
            assert file.exists() == adopted
    folder.write_checkpoint(1, {"values": np.ones(3, np.float32)}, {})
    temporary.write_bytes(data)  # of a round that was released long ago
    with folder.locked():
        assert not list((folder.path / "journal").iterdir())
