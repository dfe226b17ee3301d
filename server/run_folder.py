"""A run is a folder: what is written, when, and in which order, so that nothing is lost or half-written.

    config.toml        the resolved experiment
    plan.json          the privacy plan as calibrated, so that a resumed run keeps its noise multiplier
    cohort_key         who is sampled, until the run ends (`server.cohort_key_file`)
    metrics.jsonl      a line a round
    ledger.jsonl       bytes, seconds, failures by cause, privacy events
    lock               held by the process that runs in the folder
    journal/           the released mean of each round since the last checkpoint
    checkpoints/       whole states: a safetensors file and a readable meta file
    adapter/           at the end: the LoRA adapter as a peft folder, with its guarantee in README.md and privacy.json
    report.html

The journal is a write-ahead log: a round's release is on disk before anything is computed from it or sent, so a round
that left the server is never released again with fresh noise, and a killed run continues from its last release
(`server.journal` says what becomes of one that was being written). A checkpoint is only a shortcut that lets the
journal be shortened. All text is UTF-8, whatever the locale.

The folder is its owner's (0700). What tells who was sampled, or anything of the devices without noise, is 0600 besides,
for when the folder is copied or opened: keys, devices.csv, metrics, ledger, and the journal, which repeats both.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from fedlm.errors import DataError, OutputError
from server.journal import encode_release, read_record, release_file, settle

CONFIG, PLAN, LOCK = "config.toml", "plan.json", "lock"
METRICS, LEDGER = "metrics.jsonl", "ledger.jsonl"
KEEP_CHECKPOINTS = 2
NOTHING = -2
"""For `rewind`: before the lines that belong to no round, such as the first one of the ledger."""


class RunFolder:
    """Reads and writes one run folder.

    Arguments:
        path: The folder; `create` makes it, `open` expects it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checkpoints = path / "checkpoints"
        self._journal = path / "journal"

    @classmethod
    def create(
        cls, path: Path, texts: Mapping[str, str], *, bytes_needed: int, secrets: Mapping[str, str] | None = None
    ) -> RunFolder:
        """Make a new run folder.

        Arguments:
            path: Where.
            texts: Files to start with: CONFIG and PLAN.
            bytes_needed: Room that checkpoints and journal will take.
            secrets: Files that the owner alone may read; written before the texts make it a run folder.

        Raises:
            OutputError: It exists and is not empty, cannot be written, or the disk has too little room.
        """
        check_writable(path)
        folder = cls(path)
        with _explained(path):
            free = shutil.disk_usage(_nearest(path)).free
            if free < bytes_needed:
                raise OutputError(
                    f"{path} has {free / 1e6:.0f} MB free, but checkpoints need {bytes_needed / 1e6:.0f} MB; "
                    "free some space or choose another --out"
                )
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)  # it may have been there, empty
            folder._checkpoints.mkdir()
            folder._journal.mkdir()
            for name, text in (secrets or {}).items():
                write_atomically(path / name, text.encode(), owner_only=True)
            for name, text in texts.items():
                write_atomically(path / name, text.encode())
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run folder.

        Raises:
            DataError: It is not a run folder.
        """
        folder = cls(path)
        if not (path / CONFIG).is_file() or not (path / PLAN).is_file() or not folder._checkpoints.is_dir():
            raise DataError(
                f"{path} is not a run folder (no config.toml, plan.json or checkpoints); give the --out of a run"
            )
        return folder

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from running in this folder: two would release one round twice.

        What a killed process left half-written is put in order first (`server.journal.settle`).

        Raises:
            OutputError: Another process runs in it.
        """
        with _explained(self.path):
            stream = (self.path / LOCK).open("a", encoding="utf-8")
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"{self.path} is in use by another process; wait for it or end it") from None
            with _explained(self.path):
                self._put_in_order()
            yield

    def text(self, name: str) -> str:
        """Return one of the texts that the folder was created with."""
        return (self.path / name).read_text(encoding="utf-8")

    def metric(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        self._append(METRICS, line)

    def ledger(self, line: Mapping[str, Any]) -> None:
        """Append a line to ledger.jsonl."""
        self._append(LEDGER, line)

    def sync_ledger(self) -> None:
        """Make the ledger's lines durable."""
        with _explained(self.path), (self.path / LEDGER).open("rb") as stream:
            os.fsync(stream.fileno())

    def is_finished(self) -> bool:
        """Return whether the run has ended: every round is released, and nobody will be sampled any more."""
        marks = [line for line in self.lines(LEDGER) if line.get("event") in ("start", "resume", "end")]
        return bool(marks) and marks[-1].get("status") == "finished"

    def rewind(self, last_round: int) -> list[dict[str, Any]]:
        """Drop metrics and ledger lines of rounds after `last_round` and torn lines; return the metrics kept."""
        for name in (METRICS, LEDGER):
            kept = [line for line in self.lines(name) if int(line.get("round", -1)) <= last_round]
            text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept)
            with _explained(self.path):
                write_atomically(self.path / name, text.encode(), owner_only=True)
        return self.lines(METRICS)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the objects of a .jsonl file; a torn last line is left out."""
        file = self.path / name
        parsed: list[dict[str, Any]] = []
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
            try:
                parsed.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return parsed

    def write_release(self, round_number: int, arrays: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Make a round's release durable; `record` is what metrics and ledger will say of the round."""
        data = encode_release(arrays, record)
        with _explained(self.path):
            write_atomically(release_file(self._journal, round_number), data, owner_only=True)

    def releases(self, after: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield `(round, arrays)` of the journalled rounds after `after`, in order and without a gap."""
        expected = after + 1
        while (file := release_file(self._journal, expected)).exists():
            yield expected, load_file(file)
            expected += 1

    def release_record(self, round_number: int) -> dict[str, Any]:
        """Return the record that `write_release` stored with this round."""
        return read_record(release_file(self._journal, round_number))

    def write_checkpoint(
        self, round_number: int, arrays: Mapping[str, Any], meta: Mapping[str, Any], *, keep_journal: bool = False
    ) -> None:
        """Write a whole state, then drop old checkpoints and, unless they are kept, the journal entries before it."""
        stem = self._checkpoints / f"round_{round_number:06d}"
        with _explained(self.path):
            write_atomically(stem.with_suffix(".safetensors"), save(dict(arrays)))
            # The meta file is written last: a checkpoint without one does not count.
            write_atomically(stem.with_suffix(".json"), (json.dumps(meta, indent=2) + "\n").encode())
        for old in self._rounds()[:-KEEP_CHECKPOINTS]:
            for suffix in (".json", ".safetensors"):
                (self._checkpoints / f"round_{old:06d}{suffix}").unlink(missing_ok=True)
        if keep_journal:
            return
        oldest = min(self._rounds()[0], round_number - 1)  # this round's record is needed until its lines are written
        for file in self._journal.glob("round_*.safetensors"):
            if int(file.stem.removeprefix("round_")) <= oldest:
                file.unlink()

    def last_checkpoint(self) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Return `(round, arrays, meta)` of the newest whole state, or None before the first.

        Raises:
            DataError: It is damaged.
        """
        rounds = self._rounds()
        if not rounds:
            return None
        stem = self._checkpoints / f"round_{rounds[-1]:06d}"
        try:
            arrays = load_file(stem.with_suffix(".safetensors"))
            return rounds[-1], arrays, json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError) as error:
            fix = "delete both and resume from the one before" if len(rounds) > 1 else "the run cannot be resumed"
            raise DataError(f"checkpoint {stem}.json or .safetensors is damaged ({error}); {fix}") from error

    def _put_in_order(self) -> None:
        """Settle the journal, and delete what was to become, or was left of, other files."""
        rounds = self._rounds()
        settle(self._journal, last_checkpoint=rounds[-1] if rounds else -1)
        half_written = [f for name in (METRICS, LEDGER) for f in self.path.glob(f".{name}.*.tmp")]
        half_written += self._checkpoints.glob(".round_*.tmp")
        half_written += [f for f in self._checkpoints.glob("*.safetensors") if not f.with_suffix(".json").exists()]
        for file in half_written:
            file.unlink()

    def _rounds(self) -> list[int]:
        return sorted(int(f.stem.removeprefix("round_")) for f in self._checkpoints.glob("round_*.json"))

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with _explained(self.path), open(self.path / name, "a", encoding="utf-8", opener=owners_alone) as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")


def check_writable(path: Path) -> None:
    """Check, before any work starts, that a new run folder can be made at `path`.

    Raises:
        OutputError: It exists and is not empty, or the folder above it cannot be written.
    """
    with _explained(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"{path} exists and is not an empty folder; choose another --out or `fedlm resume` it")
        above = _nearest(path)
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{above} is a file")
        with tempfile.TemporaryDirectory(prefix=".fedlm-", dir=above):
            pass


def _nearest(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def owners_alone(path: str, flags: int) -> int:
    """Open a file that nobody but its owner may read if it is new; the `opener` of `open`."""
    return os.open(path, flags, 0o600)


def write_atomically(file: Path, data: bytes, *, owner_only: bool = False) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new and nothing between.

    Arguments:
        file: Where; what was there is replaced.
        data: All of it.
        owner_only: Nobody else may read it, at no moment.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", opener=owners_alone if owner_only else None) as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
        sync_folder(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a file that was written and renamed is lost with the power otherwise."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line that says what to do."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        fix = {
            errno.ENOSPC: "the disk is full: free some space, then `fedlm resume` this run",
            errno.EDQUOT: "the disk quota is used up: free some space, then `fedlm resume` this run",
            errno.EROFS: "the file system is read-only: choose another --out",
            errno.EACCES: "permission denied: choose an --out that you may write",
        }.get(error.errno or 0, f"{error.strerror or error}: choose another --out")
        raise OutputError(f"cannot write the run folder {path}: {fix}") from error
