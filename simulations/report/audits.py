"""What an audit of the run found: the epsilon that canaries show beside the one that is accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlm.errors import DataError
from simulations.report.figures import ABSENT, bound, figure
from simulations.report.markup import Markup, element, text
from simulations.report.tables import table
from simulations.run_files import Record, RunRecord, number

_HEADER = ("analyst", "accounted", "empirical", "95 % interval", "at least (99.9 %)", "one run (95 %)", "canaries")


def audit_section(record: RunRecord) -> list[Markup]:
    """Return the section of an audited run; nothing for others.

    Raises:
        DataError: audit.json is not what `fedlm audit` writes.
    """
    if record.audit is None:
        return []
    try:
        views = [_cells(view) for view in record.audit["views"]]
        alarms, notes = map(str, record.audit["alarms"]), map(str, record.audit["notes"])
        phrases = _phrases(record.audit["text"])
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{record.path / 'audit.json'} is not what `fedlm audit` writes; delete it") from error
    found = [text("p", f"\N{WARNING SIGN}\N{VARIATION SELECTOR-15} {alarm}", class_="stamp warn") for alarm in alarms]
    return [
        element(
            "section",
            text("h2", "Audit"),
            *(found or [text("p", "Canary devices found nothing against the claim of this run.", class_="label")]),
            *([table(_HEADER, views, "Epsilon that canaries show, by analyst")] if views else []),
            *(text("p", line, class_="note") for line in [*phrases, *notes]),
        )
    ]


def _cells(view: Mapping[str, Any]) -> tuple[str, ...]:
    gaussian, one_run = view["gaussian"], view["one_run"]
    accounted, low = number(view, "accounted"), number(gaussian, "at_least")
    least = max(value for value in (low, number(view, "one_run_at_least"), 0.0) if value is not None)
    return (
        str(view["sees"]),
        "none" if accounted is None else bound(accounted),
        figure(number(gaussian, "epsilon"), 3),
        f"{figure(number(gaussian, 'low'), 3)} to {figure(number(gaussian, 'high'), 3)}",
        figure(least, 3),
        figure(number(one_run, "epsilon"), 3),
        figure(number(gaussian, "num_canaries")),
    )


def _phrases(found: Record | None) -> list[str]:
    """Return what the phrases showed, as a sentence; none without phrases."""
    if not found:
        return []
    member, stranger = number(found, "member_exposure"), number(found, "stranger_exposure")
    chance = number(found, "p_value")
    return [
        f"Exposure of phrases: {figure(member, 3)} bits for {figure(number(found, 'num_members'))} that trained, "
        f"{figure(stranger, 3)} for {figure(number(found, 'num_strangers'))} that did not (chance: 1.44); "
        f"p = {ABSENT if chance is None else figure(chance, 2)}."
    ]
