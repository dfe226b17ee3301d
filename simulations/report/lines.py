"""Line charts in SVG: labels at the line ends, a dash pattern for each line, values on hover, no script."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from simulations.report.axes import Axis, Scale, make_scale, tick_labels
from simulations.report.figures import figure
from simulations.report.markup import Markup, element, escape, join, svg, text

WIDTH = 520.0
"""Of every chart, in user units: about the pixels of one column."""
_TOP, _BOTTOM, _LEFT, _RIGHT = 34.0, 44.0, 50.0, 18.0
_CHARACTER = 7.2  # Mean width of a label's character; generous, so that a phone's larger text fits too.
_LINE_HEIGHT = 17.0
_MAX_MARKERS = 16
_MAX_PROBES = 120
_DENSE = 100  # Vertices from which a line is drawn thin and solid: dashes would dissolve in its zigzag.
_MAX_VERTICES = 240

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line.

    Arguments:
        label: What it is; stands in the hover text, and at the line's end when `end` is empty.
        points: Finite (x, y), x ascending.
        tone: Colour and dash pattern: `a` (solid), `b` (dashed), `c` (dotted), `d` to `f` (quieter mixtures).
        end: Another label for the line's end, such as its last value.
        start: A label for its first point.
    """

    label: str
    points: tuple[Point, ...]
    tone: str = "a"
    end: str = ""
    start: str = ""


@dataclass(frozen=True)
class Reference:
    """A level to compare with, drawn as a thin horizontal line."""

    value: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A single point to find oneself by, ringed and named."""

    x: float
    y: float
    label: str


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    description: str,
    x: Axis,
    y: Axis,
    reference: Reference | None = None,
    mark: Mark | None = None,
    height: float = 290.0,
) -> Markup:
    """Return a line chart.

    Arguments:
        series: At least one with a point; those without are left out.
        title: Its name, unique on the page.
        description: What it shows, for a screen reader.
        x: The horizontal axis.
        y: The vertical axis.
        reference: A level to draw.
        mark: A point to draw.
        height: In user units; the width is `WIDTH`.

    Returns:
        An inline SVG.
    """
    drawn = [one for one in series if one.points]
    names = [one.end or one.label for one in drawn] + ([reference.label] if reference else [])
    right = WIDTH - _RIGHT - _CHARACTER * max(map(len, names))
    levels = [point[1] for one in drawn for point in one.points] + ([reference.value] if reference else [])
    places = [point[0] for one in drawn for point in one.points]
    if mark:
        levels, places = [*levels, mark.y], [*places, mark.x]
    across = make_scale(places, x, _LEFT, right)
    up = make_scale(levels, y, height - _BOTTOM, _TOP, num_ticks=max(2, round(height / 55)))
    return svg(
        title,
        description,
        WIDTH,
        height,
        _axes(across, up, x, y),
        join([_reference(reference, across, up)] if reference else []),
        join([_area(drawn[0], across, up)] if len(drawn) == 1 and up.low == 0 and not up.log else []),
        join(_line(one, across, up) for one in drawn),
        _end_labels(drawn, reference, up, right),
        _probes(drawn, across, up),
        join([_mark(mark, across(mark.x), up(mark.y))] if mark else []),
    )


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """Return at most `limit` points that keep the shape: each stretch's lowest and highest, and both ends."""
    if len(points) <= limit:
        return list(points)
    stretch = -(-len(points) // max((limit - 2) // 2, 1))
    kept = {0, len(points) - 1}
    for first in range(0, len(points), stretch):
        indices = range(first, min(first + stretch, len(points)))
        kept |= {min(indices, key=lambda i: points[i][1]), max(indices, key=lambda i: points[i][1])}
    return [points[index] for index in sorted(kept)]


def _axes(across: Scale, up: Scale, x: Axis, y: Axis) -> Markup:
    bottom = up.start
    rows = [
        element("line", x1=across.start, x2=across.stop, y1=up(tick), y2=up(tick), class_="grid") for tick in up.ticks
    ]
    row_labels = [
        text("text", label, x=across.start - 8, y=up(tick) + 4, text_anchor="end")
        for tick, label in zip(up.ticks, tick_labels(up), strict=True)
    ]
    columns = [
        element("line", x1=across(tick), x2=across(tick), y1=bottom, y2=bottom + 5, class_="axis")
        for tick in across.ticks
    ]
    column_labels = [
        text("text", label, x=across(tick), y=bottom + 19, text_anchor="middle")
        for tick, label in zip(across.ticks, tick_labels(across), strict=True)
    ]
    names = [
        text("text", y.label + (" (log scale)" if y.log else ""), x=2, y=15, class_="name"),
        text("text", x.label, x=across.stop, y=bottom + 38, text_anchor="end", class_="name"),
        element("line", x1=across.start, x2=across.stop, y1=bottom, y2=bottom, class_="axis"),
    ]
    return element("g", *rows, *row_labels, *columns, *column_labels, *names, aria_hidden="true")


def _reference(reference: Reference, across: Scale, up: Scale) -> Markup:
    level = up(reference.value)
    return element("line", x1=across.start, x2=across.stop, y1=level, y2=level, class_="reference")


def _mark(mark: Mark, x: float, y: float) -> Markup:
    return element(
        "g",
        text("title", f"{mark.label}: {figure(mark.y)} at {figure(mark.x)}"),
        element("circle", cx=x, cy=y, r=8, class_="ring"),
        text("text", mark.label, x=x + 12, y=y - 9, class_="label"),
        class_="tone-d",
    )


def _area(one: Series, across: Scale, up: Scale) -> Markup:
    points = thin(one.points, _MAX_VERTICES)
    corners = [
        (across(points[0][0]), up.start),
        *_pixels(points, across, up),
        (across(points[-1][0]), up.start),
    ]
    return element("path", d=_path(corners) + "Z", class_=f"area tone-{one.tone}")


def _line(one: Series, across: Scale, up: Scale) -> Markup:
    pixels = _pixels(thin(one.points, _MAX_VERTICES), across, up)
    parts = [element("path", d=_path(pixels), class_="line dense" if len(pixels) > _DENSE else "line")]
    if len(pixels) <= _MAX_MARKERS:
        parts += [element("circle", cx=x, cy=y, r=4, class_="mark") for x, y in pixels]
    if one.start:
        x, y = pixels[0]
        parts.append(text("text", one.start, x=x + 7, y=y - 8, class_="label"))
    return element("g", *parts, class_=f"tone-{one.tone}")


def _end_labels(drawn: Sequence[Series], reference: Reference | None, up: Scale, right: float) -> Markup:
    labels = [(up(one.points[-1][1]), one.end or one.label, f"label tone-{one.tone}") for one in drawn]
    if reference:
        labels.append((up(reference.value), reference.label, "label quiet"))
    labels.sort()
    heights = _spread([label[0] for label in labels], _TOP, up.start)
    return join(
        text("text", name, x=right + 9, y=y + 4, class_=style)
        for y, (_, name, style) in zip(heights, labels, strict=True)
    )


def _spread(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Move ascending label heights apart, down first and then up from the bottom, until none overlap."""
    heights: list[float] = []
    for height in wanted:
        heights.append(max(height, heights[-1] + _LINE_HEIGHT) if heights else max(height, top))
    limit = bottom
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], limit)
        limit = heights[index] - _LINE_HEIGHT
    return heights


def _probes(drawn: Sequence[Series], across: Scale, up: Scale) -> Markup:
    """Draw, for each x, a transparent strip with its values as a tooltip, and its points on hover."""
    places = sorted({x for one in drawn for x, _ in one.points})
    places = places[:: -(-len(places) // _MAX_PROBES)]
    centres = [across(place) for place in places]
    edges = [across.start, *((left + right) / 2 for left, right in pairwise(centres)), across.stop]
    return element(
        "g",
        *(_probe(drawn, place, edges[i : i + 2], across, up) for i, place in enumerate(places)),
        class_="probes",
    )


def _probe(drawn: Sequence[Series], place: float, edges: Sequence[float], across: Scale, up: Scale) -> Markup:
    found = [(one, value) for one in drawn if (value := _value_at(one.points, place)) is not None]
    lines = [f"{one.label} {figure(value)}" for one, value in found]
    x = across(place)
    return element(
        "g",
        text("title", "\n".join([f"at {figure(place)}", *lines])),
        element("rect", x=edges[0], y=up.stop, width=max(edges[1] - edges[0], 0.5), height=up.start - up.stop),
        element("line", x1=x, x2=x, y1=up.stop, y2=up.start),
        *(element("circle", cx=x, cy=up(value), r=4.5, class_=f"tone-{one.tone}") for one, value in found),
    )


def _value_at(points: Sequence[Point], place: float) -> float | None:
    index = bisect_left(points, (place, float("-inf")))
    return points[index][1] if index < len(points) and points[index][0] == place else None


def _pixels(points: Iterable[Point], across: Scale, up: Scale) -> list[Point]:
    return [(across(x), up(y)) for x, y in points]


def _path(pixels: Sequence[Point]) -> Markup:
    return escape("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in pixels))
