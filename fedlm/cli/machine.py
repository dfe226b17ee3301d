"""The verbs about this installation: strategies and doctor."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from fedlm.cli.options import Json
from fedlm.cli.output import print_json, print_table


def strategies(json: Json = False) -> None:
    """List the aggregation strategies.

    The built-in ones, and those that other packages install.
    """
    from fedlm.registry import STRATEGIES

    rows = STRATEGIES.rows()
    if json:
        print_json({"strategies": rows})
    else:
        print_table(("name", "class", "help"), [tuple(row.values()) for row in rows])


def doctor(
    ray: Annotated[bool, typer.Option("--ray", help="Also start and stop a Ray worker (about 10 s).")] = False,
    json: Json = False,
) -> None:
    """Check this machine.

    Versions, processor, memory, disk, permissions and environment; exits 1 when something needs a fix.
    """
    from fedlm.cli.checks import check_machine

    checks = check_machine(start_ray=ray)
    ok = all(check.ok for check in checks)
    if json:
        print_json({"ok": ok, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            mark, fix = ("ok  ", "") if check.ok else ("warn", f"; {check.fix}")
            print(f"{mark} {check.name}: {check.found}{fix}")
    raise typer.Exit(0 if ok else 1)
