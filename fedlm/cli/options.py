"""The options that several verbs share, and the config that they name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer

from fedlm.config import Config, load_config

# Arguments are explained in the verbs' docstrings: typer 0.20 on click 8.5 drops an argument's own help.
ConfigFile = Annotated[Path | None, typer.Argument(metavar="[CONFIG]", hidden=True)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", hidden=True)]
RunFolders = Annotated[list[Path], typer.Argument(metavar="RUN RUN...", hidden=True)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, for example seed=3; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress; warnings still show.")]


def read_config(path: Path | None, overrides: Sequence[str] | None) -> Config:
    """Return the config of a verb's arguments; without a path that of `simulations/recipes/default.toml`."""
    if path is not None:
        return load_config(path, overrides or ())
    with as_file(files("simulations") / "recipes" / "default.toml") as recipe:
        return load_config(recipe, overrides or ())
