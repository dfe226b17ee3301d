"""The report's text parts: the table of rounds and lists of names with values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from simulations.report.figures import ABSENT, column, figure
from simulations.report.markup import Markup, element, escape, text
from simulations.run_files import Record, RunRecord, number
from simulations.summary import lost_by_cause

_FIGURES = {
    "round": "round",
    "perplexity": "perplexity",
    "bits_per_byte": "bits / byte",
    "epsilon": "epsilon",
    "devices": "devices",
    "failed": "failed",
    "update_norm": "update norm",
    "clip_norm": "clip norm",
    "log_z_mean": "log Z mean",
    "log_z_std": "log Z std",
    "megabytes_up": "MB up, all",
    "megabytes_down": "MB down, all",
    "round_seconds": "seconds",
    "virtual_hours": "virtual hours",
}
_RAW_FIGURES = {
    "train_loss": "train loss",
    "client_norm_median": "norm median",
    "client_norm_p90": "norm p90",
    "clip_fraction": "clipped",
}


_RAW = "simulation only, not private"


def rounds_table(record: RunRecord) -> Markup:
    """Return every round's figures; those that only a simulation can see stand on the right and say so."""
    causes = list(lost_by_cause(record))
    failed = {event.get("round"): event.get("failed") or {} for event in record.events("round")}
    lines = [{**line, "failed": _failed(failed.get(line["round"]))} for line in record.metrics]
    lost_lines = [failed.get(line["round"], {}) for line in record.metrics]
    dp_metrics = list(dict.fromkeys(name for line in record.dp_metrics for name in line if name != "round"))
    raw = _RAW_FIGURES if record.has_raw else {}
    columns = [_column(lines, key) for key in _FIGURES]
    columns += [_column(record.dp_metrics, name) for name in dp_metrics]
    columns += [_column(lost_lines, cause) for cause in causes]
    columns += [_column(record.raw, key) for key in raw]
    groups = element(
        "tr",
        element("td", colspan=len(_FIGURES)),
        *([text("th", "DP metrics", colspan=len(dp_metrics), scope="colgroup")] if dp_metrics else []),
        *([text("th", "failed, by cause", colspan=len(causes), scope="colgroup", class_="group")] if causes else []),
        *([text("th", _RAW, colspan=len(raw), scope="colgroup", class_="group")] if raw else []),
    )
    shown = [name.replace("_", " ") for name in dp_metrics]
    names = [*_FIGURES.values(), *shown, *causes, *raw.values()]
    return table(names, zip(*columns, strict=True), "Table of rounds", groups)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], label: str, *above: Markup) -> Markup:
    """Return a table that scrolls in its own frame.

    Arguments:
        header, rows: As many names as cells in each row.
        label: What it is, for a screen reader.
        above: Rows over the header.
    """
    heads = element("tr", *(text("th", name, scope="col") for name in header))
    body = element("tbody", *(element("tr", *(text("td", cell) for cell in row)) for row in rows))
    framed = element("table", element("thead", *above, heads), body)
    return element("div", framed, class_="scroll", role="region", tabindex="0", aria_label=label)


def pairs(entries: Iterable[tuple[str, object]]) -> Markup:
    """Return names with their values as a definition list."""
    return element(
        "dl",
        *(element("div", text("dt", name), text("dd", _shown(value))) for name, value in entries),
        class_="pairs",
    )


def fold(title: str, *content: Markup) -> Markup:
    """Return a part that opens on a click."""
    return element("details", element("summary", escape(title)), *content)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, keyed by dotted names.

    >>> flatten({"seed": 1, "data": {"corpus": "chitchat"}})
    {'seed': 1, 'data.corpus': 'chitchat'}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _failed(by_cause: Record | None) -> int | None:
    return None if by_cause is None else sum(int(num) for num in by_cause.values())


def _column(lines: Sequence[Record], key: str) -> list[str]:
    return column([number(line, key) for line in lines])


def _shown(value: object) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return figure(value)
    return str(value)
