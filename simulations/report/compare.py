"""Runs side by side: their summaries and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from simulations.report.tables import flatten
from simulations.run_files import read_run
from simulations.summary import summarise_record


def compare_table(runs: Sequence[Path]) -> list[dict[str, object]]:
    """Return one row a run, all with the same keys in the same order.

    Arguments:
        runs: The run folders.

    Returns:
        For each run its summary and, by dotted name, each configuration key whose value differs between runs;
        None where a run's configuration lacks the key. `rounds` is always the number of rounds done.

    Raises:
        DataError: A folder is not a run, or its `config.toml` is not TOML.
    """
    records = [read_run(run) for run in runs]
    configs = [flatten(record.config()) for record in records]
    keys = dict.fromkeys(key for config in configs for key in config)
    differing = [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]
    return [
        asdict(summarise_record(record)) | {key: config.get(key) for key in differing if key != "rounds"}
        for record, config in zip(records, configs, strict=True)
    ]
