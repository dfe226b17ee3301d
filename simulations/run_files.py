"""Reading a run folder: `config.toml`, `metrics.jsonl` (a line a round) and `ledger.jsonl` (a line an event); where
there are any also `plan.json`, `audit.json` of an audit and `compare.json` of `fedlm privacy compare --run`.

A process that is killed while it writes leaves a torn last line (no line end); readers drop that one line.
Anything else that cannot be read is an error that names the file and the line.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlm.errors import DataError

Record = Mapping[str, Any]
COMPARISON = "compare.json"


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds.

    Arguments:
        path: The run folder.
        config_text: `config.toml` as written.
        metrics: One record a round; round 0 is the base before training.
        ledger: Every event, the first `start` among them.
        plan_text: `plan.json` as written; empty without one.
        audit: What an audit found; None without one.
        comparison: The mechanisms compared for this run; None before that.
    """

    path: Path
    config_text: str
    metrics: tuple[Record, ...]
    ledger: tuple[Record, ...]
    plan_text: str = ""
    audit: Record | None = None
    comparison: Record | None = None

    @property
    def start(self) -> Record:
        """The first `start` event: versions, machine, blocks, privacy figures."""
        return self.events("start")[0]

    @property
    def privacy(self) -> Record:
        """The privacy figures of the `start` event."""
        return self.start.get("privacy") or {}

    @property
    def example_level(self) -> Record:
        """What each device guarantees for its own sequences; empty without `local.example_dp`."""
        return self.privacy.get("example_level") or {}

    @property
    def stamps(self) -> tuple[str, ...]:
        """Warnings that must stand beside every privacy figure, such as `NOT PRIVATE`."""
        return _stamps(self.privacy)

    @property
    def example_stamps(self) -> tuple[str, ...]:
        """The same of the devices' own guarantee."""
        return _stamps(self.example_level)

    @property
    def status(self) -> str:
        """`finished` or `interrupted`; `unfinished` when the run still goes on or was killed."""
        marks = [event for event in self.ledger if event.get("event") in {"start", "resume", "end"}]
        return str(marks[-1].get("status", "unfinished"))

    @property
    def realised(self) -> Record:
        """The last `end` event, if it is of the last round: what the participation ledger saw until then."""
        ends = self.events("end")
        return ends[-1] if ends and ends[-1].get("round") == self.metrics[-1]["round"] else {}

    @property
    def trained_rounds(self) -> tuple[Record, ...]:
        """The metrics without round 0."""
        return tuple(record for record in self.metrics if record["round"] > 0)

    @property
    def raw(self) -> tuple[Record, ...]:
        """What devices told of their raw updates, a record a round; without figures where they told nothing."""
        return tuple({"round": line["round"], **(line.get("non_private") or {})} for line in self.metrics)

    @property
    def has_raw(self) -> bool:
        """Whether any figure of the run was computed from raw updates."""
        return any(number(line, name) is not None for line in self.raw for name in line if name != "round")

    @property
    def dp_metrics(self) -> tuple[Record, ...]:
        """What left the devices with noise, a record a round; without figures where no metric was asked for."""
        return tuple({"round": line["round"], **(line.get("dp_metrics") or {})} for line in self.metrics)

    def events(self, kind: str) -> tuple[Record, ...]:
        """Return the ledger's events of one kind, in order."""
        return tuple(event for event in self.ledger if event.get("event") == kind)

    def config(self) -> dict[str, Any]:
        """Return the configuration as nested dictionaries.

        Raises:
            DataError: `config.toml` is not TOML.
        """
        try:
            return tomllib.loads(self.config_text)
        except tomllib.TOMLDecodeError as error:
            raise DataError(f"{self.path / 'config.toml'} is not TOML: {error}; restore it") from error


def read_run(run: Path) -> RunRecord:
    """Read a run folder.

    Arguments:
        run: The folder that `fedlm simulate --out` wrote.

    Returns:
        Its configuration, metrics and ledger.

    Raises:
        DataError: The folder is not a run, or a line of it cannot be read.
    """
    record = RunRecord(
        path=run,
        config_text=_read(run, "config.toml").decode("utf-8", errors="replace"),
        metrics=_read_lines(run, "metrics.jsonl"),
        ledger=_read_lines(run, "ledger.jsonl"),
        plan_text=_read(run, "plan.json").decode("utf-8", errors="replace") if (run / "plan.json").exists() else "",
        audit=_read_object(run / "audit.json"),
        comparison=_read_object(run / COMPARISON),
    )
    if not record.events("start"):
        raise _not_a_run(run, "ledger.jsonl has no 'start' event")
    if not record.metrics:
        raise _not_a_run(run, "metrics.jsonl has no complete line yet")
    for number, line in enumerate(record.metrics, start=1):
        if type(line.get("round")) is not int:
            raise DataError(f"{run / 'metrics.jsonl'} line {number} has no integer 'round'; restore the file")
    return record


def number(record: Record, key: str) -> float | None:
    """Return a figure of a record, or None where it is absent, null or not finite."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _stamps(figures: Record) -> tuple[str, ...]:
    return tuple(str(stamp) for stamp in figures.get("stamps") or ())


def _read(run: Path, name: str) -> bytes:
    try:
        return (run / name).read_bytes()
    except OSError as error:
        raise _not_a_run(run, f"{name}: {error.strerror}") from error


def _read_object(path: Path) -> Record | None:
    """Return the JSON object of a file that need not be there."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); restore it or delete it") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is not a JSON object; restore it or delete it")
    return found


def _read_lines(run: Path, name: str) -> tuple[Record, ...]:
    *lines, torn = _read(run, name).split(b"\n")
    records = [_parse(line, run / name, number) for number, line in enumerate(lines, start=1)]
    if torn:
        # A whole object that only lacks its line end is complete: no prefix of a JSON object is one.
        with suppress(DataError):
            records.append(_parse(torn, run / name, len(lines) + 1))
    return tuple(records)


def _parse(line: bytes, path: Path, number: int) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path} line {number} is not JSON ({error}); restore the file") from error
    if not isinstance(record, dict):
        raise DataError(f"{path} line {number} is not a JSON object; restore the file")
    return record


def _not_a_run(run: Path, why: str) -> DataError:
    return DataError(f"{run} is not a run folder ({why}); give a folder that `fedlm simulate --out` wrote")
