"""`fedlm config`: what a config means, and whether it is one."""

from __future__ import annotations

from typing import Annotated

import typer

from fedlm.cli.options import ConfigFile, Json, Overrides, read_config
from fedlm.cli.output import print_json, print_table
from fedlm.config import config_hash, describe

app = typer.Typer(help="Explain and check configs.")


@app.command()
def show(
    config: ConfigFile = None,
    overrides: Overrides = None,
    json: Json = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/configuration.md: every key there is, without values.")
    ] = False,
) -> None:
    """List every key: value, default, range, help.

    CONFIG is a TOML file; left out: the embedded default job.
    """
    if markdown:
        from fedlm.config.page import configuration_page

        print(configuration_page(), end="")
        return
    settings = read_config(config, overrides)
    rows = describe(settings)
    if json:
        print_json({"hash": config_hash(settings), "keys": rows})
    else:
        header = ("key", "value", "default", "allowed", "help")
        print_table(header, [[_shown(row[name], name) for name in header] for row in rows])


@app.command()
def check(config: ConfigFile = None, overrides: Overrides = None, json: Json = False) -> None:
    """Check a config and print its hash.

    CONFIG is a TOML file; left out: the embedded default job. Equal hashes mean equal configs.
    """
    digest = config_hash(read_config(config, overrides))
    if json:
        print_json({"ok": True, "hash": digest})
    else:
        print(f"ok {digest}")


def _shown(value: object, column: str) -> str:
    from fedlm.config.keys import show

    return show(value) if column in ("value", "default") else str(value)
