"""The report of a run as one HTML file: no script, nothing loaded, light and dark, screen and paper."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedlm.errors import OutputError
from fedlm.rounding import verdict
from simulations.report.audits import audit_section
from simulations.report.figures import bound, change, column, count, duration, figure, moment, size_unit
from simulations.report.markup import Markup, element, escape, text
from simulations.report.mechanisms import mechanism_section
from simulations.report.panels import diagnostic_panels, epsilon_panel, fleet_panels, learning_panels
from simulations.report.releases import metric_panels, release_panels
from simulations.report.style import STYLE
from simulations.report.tables import fold, pairs, rounds_table
from simulations.report.wording import mechanism_in_words, sampler_in_words
from simulations.run_files import Record, RunRecord, read_run
from simulations.summary import RunSummary, summarise_record

_RARE = {"epsilon_server", "epsilon_as_published"}  # of one mechanism, of one allocation
_BOUNDS = {"epsilon", "epsilon_of_this_fleet", "epsilon_realised", *_RARE}
_WORDS = {"mechanism": mechanism_in_words, "sampler": sampler_in_words}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder, whether the run has finished or not.

    Arguments:
        run: The run folder.

    Returns:
        The path of the report.

    Raises:
        DataError: The folder is not a run, or a file of it is broken.
        OutputError: The file cannot be written.
    """
    page = "<!DOCTYPE html>\n" + render(read_run(run))
    path = run / "report.html"
    temporary = run / f".report.{os.getpid()}.tmp"
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # a read-only folder refuses this too
            temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path} cannot be written: {error.strerror}; free space or make the folder writable"
        ) from error
    return path


def render(record: RunRecord) -> Markup:
    """Return the page of a run, without its document type."""
    summary = summarise_record(record)
    name = record.path.resolve().name
    title = " · ".join([*map(verdict, record.stamps), name, "fedlm run"])
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        text("title", title),
        element("style", STYLE),
    )
    main = element(
        "main",
        _header(record, summary, name),
        _tiles(record, summary),
        _privacy(record),
        *audit_section(record),
        *mechanism_section(record),
        _section("Learning", *learning_panels(record)),
        _section("The fleet", *fleet_panels(record)),
        *_releases(record),
        _diagnostics(record),
        _details(record),
        _footer(),
    )
    return element("html", head, element("body", main), lang="en")


def _header(record: RunRecord, summary: RunSummary, name: str) -> Markup:
    chips = [
        text("span", record.status, class_="chip"),
        *(_stamp(verdict(stamp), "chip alarm", "span") for stamp in record.stamps),
    ]
    started = record.start.get("time")
    facts = [count(summary.rounds, "round"), count(summary.devices_trained, "device training")]
    facts += [f"started {moment(started)}"] if started else []
    return element(
        "header",
        text("p", "fedlm · private federated learning", class_="brand"),
        element("h1", escape(name), *chips),
        text("p", " · ".join(facts), class_="facts"),
    )


def _tiles(record: RunRecord, summary: RunSummary) -> Markup:
    up, down = summary.bytes_up_per_device, summary.bytes_down_per_device
    divisor, unit = size_unit(max(up, down))
    traffic = " / ".join(column([up / divisor, down / divisor], 3))
    peak = summary.peak_device_mb
    return element(
        "section",
        _perplexity_tile(summary),
        _tile("bits per byte", figure(summary.bits_per_byte), "held-out text, any vocabulary"),
        _epsilon_tile(record, summary),
        _tile("up / down per device", f"{traffic} {unit}", "in one round; the base is cached"),
        _tile(
            "peak device memory",
            f"{figure(peak, 3)} MB" if peak is not None else figure(None),
            "process and libraries included",
        ),
        _tile("devices per second", figure(summary.devices_per_second, 3), "training only, without evaluation"),
        _tile("time", duration(summary.seconds), count(summary.rounds, "round")),
        *([_virtual_tile(summary.virtual_hours)] if summary.virtual_hours is not None else []),
        class_="tiles",
        aria_label="Key figures",
    )


def _virtual_tile(hours: float) -> Markup:
    return _tile("virtual time", duration(3600 * hours), "of the fleet; rounds start at fixed times")


def _perplexity_tile(summary: RunSummary) -> Markup:
    before, after = summary.perplexity_initial, summary.perplexity
    if before is None or after is None:
        return _tile("perplexity", figure(after), "no evaluation before training", wide=True)
    found = f"{change(before, after)} than the base" if before != after else "as the base"
    value = element(
        "p",
        text("span", figure(before), class_="before"),
        text("span", " → ", class_="arrow"),
        text("span", figure(after)),
        class_="value",
    )
    return element(
        "div",
        text("p", "perplexity", class_="tile-name"),
        value,
        text("p", found, class_="note strong"),
        class_="tile wide",
    )


def _epsilon_tile(record: RunRecord, summary: RunSummary) -> Markup:
    value = "none" if summary.epsilon is None else bound(summary.epsilon)
    note = f"at delta {figure(summary.delta)}" if summary.epsilon is not None else "no finite bound"
    if summary.shows_realised:
        note += f", planned; realised {bound(summary.epsilon_realised)}"
    return _tile("epsilon", value, note, stamps=record.stamps)


def _tile(name: str, value: str, note: str, *, wide: bool = False, stamps: tuple[str, ...] = ()) -> Markup:
    warnings = [_stamp(verdict(stamp), "note warn") for stamp in stamps]
    return element(
        "div",
        text("p", name, class_="tile-name"),
        text("p", value, class_="value"),
        text("p", note, class_="note"),
        *warnings,
        class_="tile wide" if wide else "tile",
    )


def _privacy(record: RunRecord) -> Markup:
    banner = [element("div", *(_stamp(stamp, "stamp") for stamp in record.stamps), class_="stamps")]
    statement = str(record.privacy.get("privacy_statement") or "This run makes no privacy statement.")
    figures = [
        (key.replace("_", " "), _figure(key, value))
        for key, value in [*record.privacy.items(), *_realised(record).items()]
        if key not in {"privacy_statement", "stamps"} and not isinstance(value, dict | list)
        if value is not None or key not in _RARE
    ]
    claim = element("div", text("h2", "Privacy"), text("p", statement, class_="statement"), *_example_level(record))
    return element(
        "section",
        *(banner if record.stamps else []),
        element("div", claim, epsilon_panel(record), class_="columns"),
        pairs(figures),
        class_="privacy stamped" if record.stamps else "privacy",
    )


def _example_level(record: RunRecord) -> tuple[Markup, ...]:
    """Return what each device guarantees for its own sequences, apart from the user-level claim."""
    statement = record.example_level.get("privacy_statement")
    if not statement:
        return ()
    warnings = (_stamp(stamp, "note warn") for stamp in record.example_stamps)
    return (text("p", str(statement), class_="statement"), *warnings)


def _figure(key: str, value: Any) -> Any:
    """Return a privacy figure as it is to be read: bounds rounded up, names in words."""
    if key in _BOUNDS and value is not None:
        return bound(value)
    return _WORDS[key](value) if key in _WORDS and isinstance(value, str) else value


def _realised(record: RunRecord) -> Record:
    """Return what the participation ledger saw, and the epsilon that follows."""
    names = {
        "epsilon_realised": "epsilon_realised",
        "separation": "separation_realised",
        "max_participations": "most_participations_realised",
    }
    return {name: record.realised[key] for key, name in names.items() if key in record.realised}


def _stamp(stamp: str, style: str, tag: str = "p") -> Markup:
    # The variation selector keeps the sign in the text's own colour: no emoji.
    return text(tag, f"\N{WARNING SIGN}\N{VARIATION SELECTOR-15} {stamp}", class_=style)


def _section(title: str, *panels: Markup) -> Markup:
    return element("section", text("h2", title), element("div", *panels, class_="columns"))


def _releases(record: RunRecord) -> list[Markup]:
    panels = [*release_panels(record), *metric_panels(record)]
    return [_section("Releases", *panels)] if panels else []


def _diagnostics(record: RunRecord) -> Markup:
    label = (
        element(
            "p",
            text("strong", "Simulation only, not private."),
            escape(
                " The devices' norms and the clipped share are computed from raw updates, which a deployed server "
                "never sees; what was released stands beside them to compare."
            ),
            class_="label",
        )
        if record.has_raw
        else escape("")
    )
    return element(
        "section",
        text("h2", "Updates"),
        label,
        element("div", *diagnostic_panels(record), class_="columns"),
        class_="raw" if record.has_raw else None,
    )


def _details(record: RunRecord) -> Markup:
    versions = record.start.get("versions") or {}
    start = record.start
    machine = [("machine", start.get("machine")), ("config hash", start.get("config_hash"))]
    return element(
        "section",
        text("h2", "Details"),
        fold("Rounds", *(_stamp(stamp, "note warn") for stamp in record.stamps), rounds_table(record)),
        fold("Configuration", element("pre", text("code", record.config_text), tabindex="0")),
        fold("Versions and machine", pairs([*versions.items(), *machine])),
        *_fleet(record.start.get("fleet") or {}),
    )


def _fleet(fleet: Record) -> list[Markup]:
    """Return whose devices they are: profile, classes, and how many users of the corpus they stand for."""
    figures = {key: value for key, value in fleet.items() if key not in ("classes", "profile_digest")}
    classes = {f"devices of class {name}": number for name, number in (fleet.get("classes") or {}).items()}
    entries = [(key.replace("_", " "), value) for key, value in {**figures, **classes}.items()]
    return [fold("Fleet", pairs(entries))] if entries else []


def _footer() -> Markup:
    return text(
        "footer",
        "MB is a million bytes. Hover over a chart for its values; the table of rounds has them all.",
    )
