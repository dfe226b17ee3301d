"""The verbs about this installation: strategies and doctor."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from importlib.metadata import entry_points
from typing import Annotated

import typer

from fedlm.cli.options import Json
from fedlm.cli.output import print_json, print_table


def strategies(json: Json = False) -> None:
    """List the aggregation strategies.

    The built-in ones, and those that other packages install.
    """
    from server.strategies import BUILT_IN

    rows = [
        {"name": name, "class": f"{kind.__module__}:{kind.__qualname__}", "help": _first_line(kind)}
        for name, kind in BUILT_IN.items()
    ]
    # Other packages are listed but not imported: a broken one must not break the list.
    installed = sorted(entry_points(group="fedlm.strategies"), key=lambda point: point.name)
    rows += [{"name": point.name, "class": point.value, "help": "(entry point)"} for point in installed]
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


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]
