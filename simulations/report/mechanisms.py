"""Which mechanism: the noise of each at equal epsilon, as a chart, and as a section of the report of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlm.errors import DataError
from fedlm.privacy.mechanisms.compare import Row
from fedlm.rounding import stamped
from simulations.report.axes import Axis
from simulations.report.figures import bound, figure
from simulations.report.lines import Mark, Series, line_chart
from simulations.report.markup import Markup, element, escape, text
from simulations.report.panels import card
from simulations.report.tables import table
from simulations.run_files import RunRecord

_TITLE = "Noise of the model at equal epsilon"
_HEADER = ("epsilon", "mechanism", "RMSE", "z", "z / n", "fleet", "assumes of sampling", "needs")
# Best first; local noise is a hundred times beyond the others and stands in the table alone.
_TONES = {
    "banded, cyclic Poisson cohorts": "a",
    "blt": "b",
    "gaussian, Poisson cohorts": "c",
    "tree": "d",
    "banded": "e",
    "gaussian": "f",
}


def noise_chart(rows: Sequence[Row], own: Mapping[str, Any] | None = None) -> Markup:
    """Return prefix RMSE against epsilon, a line for each mechanism: of several with other parameters the best.

    Arguments:
        rows: Of `fedlm.privacy.mechanisms.compare.compare`.
        own: A run's `epsilon` and `prefix_rmse`, to be marked.
    """
    best: dict[str, dict[float, float]] = {}
    for row in rows:
        of_kind = best.setdefault(row.mechanism.split(" (")[0], {})
        of_kind[row.epsilon] = min(row.prefix_rmse, of_kind.get(row.epsilon, row.prefix_rmse))
    series = [
        Series(kind.replace(" cohorts", ""), tuple(sorted(best[kind].items())), tone)
        for kind, tone in _TONES.items()
        if kind in best
    ]
    return line_chart(
        series,
        title=_TITLE,
        description="; ".join(f"{one.label} ends at {figure(one.points[-1][1])}" for one in series),
        x=Axis("epsilon", log=len({row.epsilon for row in rows}) > 1),
        y=Axis("RMSE, clip norms", log=True),
        mark=Mark(float(own["epsilon"]), float(own["prefix_rmse"]), "this run") if own else None,
        height=340.0,
    )


def cells(rows: Sequence[Row]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """Return header and cells of the table of mechanisms."""
    return _HEADER, [
        (
            f"{row.epsilon:g}",
            row.mechanism,
            f"{row.prefix_rmse:.3g}",
            f"{row.noise_multiplier:.4g}",
            f"{row.noise_in_mean:.3g}",
            "real" if row.real_fleet else "simulated",
            row.sampling,
            f"{row.num_vectors} vectors{', a ledger' if row.needs_ledger else ''}",
        )
        for row in rows
    ]


def mechanism_section(record: RunRecord) -> list[Markup]:
    """Return the section of a run whose mechanisms were compared; nothing for others.

    Raises:
        DataError: compare.json is not what `fedlm privacy compare --run` writes.
    """
    if record.comparison is None:
        return []
    rows, own, advice = _read(record, record.comparison)
    spent = stamped(f"epsilon {bound(own['epsilon'])}", record.stamps)
    own_words = f"{own['mechanism']}: RMSE {figure(own['prefix_rmse'])} at {spent}"
    chart = card(
        _TITLE,
        "Root mean square noise of a coordinate of the prefix sums of all releases, which is where the model is; the "
        f"measure to choose by. This run is marked ({own_words}).",
        noise_chart(rows, own),
    )
    words = element(
        "div", text("h3", "At equal epsilon"), *(text("p", one, class_="note") for one in advice), class_="card"
    )
    return [
        element(
            "section",
            text("h2", "Which mechanism"),
            element("div", chart, words, class_="columns"),
            element(
                "details",
                element("summary", escape("All mechanisms")),
                text("p", stamped("For the accounted fleet and the delta of this run.", record.stamps), class_="note"),
                table(*cells(rows), "All mechanisms"),
            ),
        )
    ]


def _read(record: RunRecord, fields: Mapping[str, Any]) -> tuple[list[Row], Mapping[str, Any], list[str]]:
    try:
        rows = [Row(**row) for row in fields["rows"]]
        own, advice = fields["run"], [str(one) for one in fields["advice"]]
        figures = [(row.epsilon, row.prefix_rmse, row.noise_multiplier, row.noise_in_mean) for row in rows]
        sound = bool(rows) and all(one > 0 for part in [*figures, (own["epsilon"], own["prefix_rmse"])] for one in part)
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(record) from error
    if not sound:
        raise _broken(record)
    return rows, own, advice


def _broken(record: RunRecord) -> DataError:
    return DataError(f"{record.path / 'compare.json'} is not what `fedlm privacy compare --run` writes; delete it")
