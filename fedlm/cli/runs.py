"""The verbs that make and read runs: simulate, resume, report, compare, pretrain."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlm.cli.options import ConfigFile, Json, Overrides, Quiet, RunFolder, RunFolders, read_config
from fedlm.cli.output import print_json, print_pairs, print_table
from fedlm.cli.progress import progress
from fedlm.rounding import stamped

if TYPE_CHECKING:
    from simulations.summary import RunSummary

OutFolder = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="The run folder; left out: a new one under runs/.")
]


def simulate(
    config: ConfigFile = None,
    overrides: Overrides = None,
    out: OutFolder = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train over a simulated fleet.

    CONFIG is a TOML file; left out: the embedded default job.
    """
    settings = read_config(config, overrides)
    from simulations.run import simulate

    with progress(quiet=quiet, json=json) as listener:
        summary = simulate(settings, out, listener)
    _print_summary(summary, json)


def resume(run: RunFolder, json: Json = False, quiet: Quiet = False) -> None:
    """Continue the run of a run folder."""
    from simulations.run import resume

    with progress(quiet=quiet, json=json) as listener:
        summary = resume(run, listener)
    _print_summary(summary, json)


def report(run: RunFolder, json: Json = False) -> None:
    """Write the HTML report of a run folder."""
    from simulations.report import write_report

    path = write_report(run)
    if json:
        print_json({"report": path})
    else:
        print(path)


def compare(runs: RunFolders, json: Json = False) -> None:
    """Print the figures of run folders side by side."""
    from simulations.report import compare_table

    rows = compare_table(runs)
    if json:
        print_json({"runs": rows})
    else:
        # One row a figure, one column a run: a terminal is wide enough for a few runs, not for all figures.
        figures = [(name, *(_shown(row.get(name)) for row in rows)) for name in rows[0]]
        print_table(figures[0], figures[1:])


def pretrain(config: ConfigFile = None, overrides: Overrides = None, json: Json = False, quiet: Quiet = False) -> None:
    """Train the public base, or find it in the cache.

    CONFIG is a TOML file; left out: the embedded default job.
    """
    settings = read_config(config, overrides)
    from simulations.run import pretrain

    with progress(quiet=quiet, json=json) as listener:
        base = pretrain(settings, listener)
    if json:
        print_json({"base": base})
    else:
        print(base)


def _print_summary(summary: RunSummary, json: bool) -> None:
    if json:
        print_json(asdict(summary))
        return
    from simulations.report.figures import data_size, figure
    from simulations.report.wording import spent_in_words

    up, down = data_size(summary.bytes_up_per_device), data_size(summary.bytes_down_per_device)
    print_pairs(
        [
            ("perplexity", _change(summary.perplexity_initial, summary.perplexity)),
            ("bits per byte", figure(summary.bits_per_byte)),
            ("privacy", spent_in_words(summary)),
            *_noise(summary),
            ("", summary.privacy_statement),
            *_example_level(summary),
            (
                "device",
                f"{up} up, {down} down a round; {figure(summary.peak_device_mb, 3)} MB of memory at most",
            ),
            ("training", f"{summary.rounds} rounds, {figure(summary.devices_trained)} devices"),
            *_fleet(summary),
            (
                "speed",
                f"{figure(summary.devices_per_second, 3)} devices/s, {figure(summary.seconds, 3)} s in all",
            ),
            ("run", summary.run_dir),
            ("report", str(Path(summary.run_dir) / "report.html")),
        ]
    )


def _example_level(summary: RunSummary) -> list[tuple[str, str]]:
    """Return what devices guarantee for their own sequences, apart from the user-level guarantee; none without."""
    from simulations.report.figures import bound, figure

    if summary.example_epsilon is None:
        return []
    spent = f"epsilon {bound(summary.example_epsilon, 3)} at delta {figure(summary.example_delta, 2)}"
    spent = stamped(f"{spent} for each sequence", summary.example_stamps)
    return [("on the device", spent), ("", summary.example_statement)]


def _noise(summary: RunSummary) -> list[tuple[str, str]]:
    """Return the line of mechanism and sampler; none without privacy."""
    from simulations.report.wording import mechanism_in_words, sampler_in_words

    if not summary.mechanism:
        return []
    return [("noise", f"{mechanism_in_words(summary.mechanism)}; {sampler_in_words(summary.sampler)}")]


def _fleet(summary: RunSummary) -> list[tuple[str, str]]:
    """Return the lines of a simulated fleet: none where every device took part and no clock ran."""
    from simulations.report.figures import figure

    lines = []
    if lost := summary.lost_by_cause:
        causes = ", ".join(f"{cause} {figure(count)}" for cause, count in lost.items())
        lines.append(("lost", f"{figure(sum(lost.values()))} of {figure(summary.devices_sampled)} sampled: {causes}"))
    if summary.virtual_hours is not None:
        lines.append(("fleet clock", f"{figure(summary.virtual_hours, 3)} virtual hours"))
    return lines


def _change(before: float | None, after: float | None) -> str:
    """Return `412.3 → 301.2 (-26.9 %)`."""
    from simulations.report.figures import figure

    change = f" ({100 * (after / before - 1):+.1f} %)" if before and after else ""
    return f"{figure(before)} → {figure(after)}{change}"


def _shown(value: object) -> str:
    from simulations.report.figures import ABSENT, figure

    if value is None:
        return ABSENT
    if isinstance(value, tuple):
        return "; ".join(map(str, value)) or ABSENT
    return figure(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
