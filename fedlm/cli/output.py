"""What goes to standard output: one JSON object, or tables for people."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_PIPED_WIDTH = 200


def print_json(value: Mapping[str, object]) -> None:
    """Print one JSON object on one line; NaN and infinities are null, paths are text."""
    print(json.dumps(_plain(value), allow_nan=False))


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print labels and values in two columns; the terminal wraps long values, so paths stay whole."""
    from rich.text import Text

    rows = list(pairs)
    width = max(len(label) for label, _ in rows)
    console = _console()
    for label, value in rows:
        console.print(Text.assemble((f"{label:<{width}}  ", "bold"), value), soft_wrap=True)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table without rules; cells are plain text, never markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    _console().print(table)


def _console() -> Console:
    from rich.console import Console

    # Not a terminal: rich would fold everything at 80 columns.
    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | None) else str(value)
