"""`fedlm audit`: a run with canaries in it, and the epsilon that they show beside the one accounted for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlm.cli.options import ConfigFile, Json, Overrides, Quiet, read_config
from fedlm.cli.output import print_json, print_pairs, print_table
from fedlm.cli.progress import progress

if TYPE_CHECKING:
    from fedlm.auditing import AuditReport, TextReport
    from fedlm.config import Config

NumCanaries = Annotated[
    int | None, typer.Option("--canaries", min=0, metavar="K", help="Devices that contribute a known direction.")
]
NumTextCanaries = Annotated[
    int | None, typer.Option("--text-canaries", min=0, metavar="K", help="Devices that train on a random phrase.")
]
OutFolder = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="The run folder; left out: a new one under runs/.")
]


def audit(
    config: ConfigFile = None,
    overrides: Overrides = None,
    canaries: NumCanaries = None,
    text_canaries: NumTextCanaries = None,
    out: OutFolder = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train with canary devices in the fleet and hold what they show against the accounted epsilon.

    CONFIG is a TOML file, or the run folder of an audit; left out: the embedded default job. Without any number of
    canaries there are 200, and 20 with phrases. The exit code is 1 if the run is less private than it claims.
    """
    from simulations.run_audit import audit, audit_run

    with progress(quiet=quiet, json=json) as listener:
        if config is not None and config.is_dir():
            report = audit_run(config, listener)
        else:
            report = audit(_with_canaries(config, overrides or [], canaries, text_canaries), out, listener)
    if json:
        print_json(report.to_fields())
    else:
        _print(report)
    if report.alarms:
        for alarm in report.alarms:
            print(f"fedlm: {alarm}", file=sys.stderr)
        raise typer.Exit(1)


def _with_canaries(path: Path | None, overrides: list[str], gradient: int | None, text: int | None) -> Config:
    """Return the config with the canaries that the options ask for; with some if nobody asked for any."""
    if gradient is None and text is None:
        from simulations.run_audit import with_canaries

        return with_canaries(read_config(path, overrides))
    asked = {"audit.canaries": gradient, "audit.text_canaries": text}
    return read_config(path, [*overrides, *(f"{key}={count}" for key, count in asked.items() if count is not None)])


def _print(report: AuditReport) -> None:
    from fedlm.privacy.guarantee import to_lines
    from simulations.report.figures import bound, figure

    if report.views:
        header = ("analyst", "accounted", "empirical", "95 % interval", "at least (99.9 %)", "one run (95 %)", "null")
        print_table(
            header,
            [
                (
                    view.sees,
                    bound(view.accounted),
                    figure(view.gaussian.epsilon, 3),
                    f"{figure(view.gaussian.low, 3)} to {figure(view.gaussian.high, 3)}",
                    figure(view.at_least, 3),
                    figure(view.one_run.epsilon, 3),
                    f"{view.stranger_mean:+.2f} ± {view.stranger_rms:.2f}" + (" BROKEN" if view.is_broken else ""),
                )
                for view in report.views
            ],
        )
    cost = report.cost
    print_pairs(
        [
            ("verdict", f"{len(report.alarms)} alarms" if report.alarms else "nothing against the claim was found"),
            *([("phrases", _exposure(report.text))] if report.text else []),
            (
                "cost",
                f"{cost.fleet_share:.1%} of the fleet are canaries; they add {figure(cost.ratio, 2)} of the noise's "
                "norm to a round",
            ),
            *(("note", note) for note in report.notes),
            *(("claim" if not place else "", line) for place, line in enumerate(to_lines(report.guarantee))),
            ("run", report.run_dir),
            ("audit", str(Path(report.run_dir) / "audit.json")),
        ]
    )


def _exposure(text: TextReport) -> str:
    from simulations.report.figures import figure

    chance = "" if text.p_value is None else f", p = {figure(text.p_value, 2)}"
    return (
        f"exposure {figure(text.member_exposure, 3)} bits for {text.num_members} that trained, "
        f"{figure(text.stranger_exposure, 3)} for {text.num_strangers} that did not (chance: 1.44){chance}"
    )
