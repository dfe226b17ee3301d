"""The figures that stand for a run: `fedlm simulate --json` prints them, the report opens with them."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path

from fedlm.errors import ConfigError
from fedlm.registry import COHORT_SAMPLERS
from simulations.run_files import RunRecord, number, read_run


@dataclass(frozen=True)
class RunSummary:
    """One run in figures; None where a run did not measure one, and an infinite epsilon is None too.

    Arguments:
        run_dir: The run folder.
        rounds: Rounds done.
        devices_trained: Trainings that entered an aggregate, over all rounds.
        perplexity_initial: Of the base, before the first round.
        perplexity: At the last evaluation.
        bits_per_byte: At the last evaluation.
        epsilon: Spent so far at `delta`, as planned; None is no finite epsilon.
        epsilon_realised: The same for the participation that the ledger saw; None while a run goes on.
        delta: Of the privacy statement.
        mechanism: How the noise of the rounds is made; empty without privacy.
        sampler: How cohorts are drawn; likewise.
        privacy_statement: The whole claim in words.
        stamps: Warnings that must stand wherever an epsilon of the run stands.
        example_epsilon: Of one sequence of a device, whoever sees what it sends; None without `local.example_dp`.
        example_delta: Of that guarantee.
        example_statement: It in words, apart from the user-level one; empty without.
        example_stamps: Its warnings.
        bytes_up_per_device: What one device sends in one round, the mean over all that sent anything.
        bytes_down_per_device: What one device receives in one round, likewise.
        peak_device_mb: The largest memory of one device's training, in MB.
        devices_per_second: Trainings a second of the rounds' own time, evaluation excluded.
        seconds: Wall time of the run.
        devices_sampled: Devices in all cohorts.
        lost_by_cause: How many of them did not train, by cause.
        virtual_hours: From the first round's start to the last one's end on the fleet's own clock; None without one.
        evaluation: Further figures of the last evaluation, by name (`evaluation.metrics`).
    """

    run_dir: str
    rounds: int
    devices_trained: int
    perplexity_initial: float | None
    perplexity: float | None
    bits_per_byte: float | None
    epsilon: float | None
    epsilon_realised: float | None
    delta: float | None
    mechanism: str
    sampler: str
    privacy_statement: str
    stamps: tuple[str, ...]
    example_epsilon: float | None
    example_delta: float | None
    example_statement: str
    example_stamps: tuple[str, ...]
    bytes_up_per_device: int
    bytes_down_per_device: int
    peak_device_mb: float | None
    devices_per_second: float
    seconds: float
    devices_sampled: int
    lost_by_cause: dict[str, int]
    virtual_hours: float | None
    evaluation: dict[str, float] = field(default_factory=dict)

    @property
    def counts_participations(self) -> bool:
        """Whether the guarantee rests on how often a device came."""
        with suppress(ConfigError):  # a plug-in that is gone
            return bool(COHORT_SAMPLERS.resolve(self.sampler).keeps_separation)
        return False

    @property
    def shows_realised(self) -> bool:
        """Whether what the ledger saw belongs beside the plan: they differ, or the plan rests on the ledger."""
        if self.epsilon is None or self.epsilon_realised is None:
            return False
        return self.counts_participations or not isclose(self.epsilon, self.epsilon_realised, rel_tol=1e-6)


def summarise(run: Path) -> RunSummary:
    """Return the summary of a run folder, finished or not.

    Arguments:
        run: The run folder.

    Returns:
        Its figures, from `metrics.jsonl` and `ledger.jsonl` alone.

    Raises:
        DataError: The folder is not a run, or a file of it is broken.
    """
    return summarise_record(read_run(run))


def summarise_record(record: RunRecord) -> RunSummary:
    """Return the summary of a run that has been read."""
    trained, sampled = int(_total(record, "trained")), int(_total(record, "sampled"))
    training_s = _total(record, "seconds")
    return RunSummary(
        run_dir=str(record.path),
        rounds=record.metrics[-1]["round"],
        devices_trained=trained,
        perplexity_initial=number(record.metrics[0], "perplexity"),
        perplexity=_last(record, "perplexity"),
        bits_per_byte=_last(record, "bits_per_byte"),
        evaluation=next((line["evaluation"] for line in reversed(record.metrics) if line.get("evaluation")), {}),
        epsilon=number(record.metrics[-1], "epsilon"),
        epsilon_realised=number(record.realised, "epsilon_realised"),
        delta=number(record.privacy, "delta"),
        mechanism=_privately(record, "mechanism"),
        sampler=_privately(record, "sampler"),
        privacy_statement=str(record.privacy.get("privacy_statement") or ""),
        stamps=record.stamps,
        example_epsilon=number(record.example_level, "epsilon"),
        example_delta=number(record.example_level, "delta"),
        example_statement=str(record.example_level.get("privacy_statement") or ""),
        example_stamps=record.example_stamps,
        bytes_up_per_device=round(_total(record, "bytes_up") / max(_total(record, "uploaded"), 1)),
        bytes_down_per_device=round(_total(record, "bytes_down") / max(_total(record, "downloaded"), 1)),
        peak_device_mb=_peak_device_mb(record),
        devices_per_second=trained / training_s if training_s > 0 else 0.0,
        seconds=_seconds(record),
        devices_sampled=sampled,
        lost_by_cause=lost_by_cause(record),
        virtual_hours=number(record.metrics[-1], "virtual_hours"),
    )


def lost_by_cause(record: RunRecord) -> dict[str, int]:
    """Return how many devices were sampled and did not train, by cause, the most frequent first."""
    lost: Counter[str] = Counter()
    for event in record.events("round"):
        lost.update({str(cause): int(count) for cause, count in (event.get("failed") or {}).items()})
    return dict(lost.most_common())


def _privately(record: RunRecord, key: str) -> str:
    return str(record.privacy.get(key) or "") if record.privacy.get("enabled") else ""


def _total(record: RunRecord, key: str) -> float:
    return sum(number(event, key) or 0.0 for event in record.events("round"))


def _last(record: RunRecord, key: str) -> float | None:
    values = [value for line in record.metrics if (value := number(line, key)) is not None]
    return values[-1] if values else None


def _peak_device_mb(record: RunRecord) -> float | None:
    # A resumed run has one `end` event a session; the device that needed most may be in any of them.
    peaks = [peak for event in record.events("end") if (peak := number(event, "peak_device_mb")) is not None]
    return max(peaks, default=None)


def _seconds(record: RunRecord) -> float:
    last = record.ledger[-1]
    ended = number(last, "seconds") if last.get("event") == "end" else None
    return ended if ended is not None else number(record.metrics[-1], "seconds") or 0.0
