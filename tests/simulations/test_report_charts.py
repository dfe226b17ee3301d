"""Charts are read back from their SVG, by the tick labels alone; axes and labels hold their properties."""

from __future__ import annotations

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.report.axes import Axis, make_scale, suits_log, tick_labels
from simulations.report.bars import Bar, bar_chart
from simulations.report.figures import bound, column, data_size, figure
from simulations.report.lines import Reference, Series, line_chart, thin
from simulations.report.lines import _spread as spread_labels

FINITE = st.floats(-1e9, 1e9).map(lambda value: round(value, 6))
POSITIVE = st.floats(1e-6, 1e9)


@given(st.lists(FINITE, min_size=1, max_size=20), st.booleans(), st.booleans(), st.booleans())
def test_linear_ticks_are_round_even_and_inside(
    values: list[float], whole: bool, from_zero: bool, rounded: bool
) -> None:
    scale = make_scale(values, Axis("x", whole=whole, from_zero=from_zero, rounded=rounded), 10.0, 110.0)
    tolerance = 1e-6 * (scale.high - scale.low)
    assert all(10 - 1e-3 <= scale(value) <= 110 + 1e-3 for value in values)
    assert all(scale.low - tolerance <= tick <= scale.high + tolerance for tick in scale.ticks)
    steps = [right - left for left, right in pairwise(scale.ticks)]
    assert len(scale.ticks) <= 10
    for step in steps:
        assert step == pytest.approx(steps[0])
        assert any(math.isclose(step, m * 10.0 ** round(math.log10(step / m)), rel_tol=1e-6) for m in (1, 2, 5))
    if whole:
        assert all(math.isclose(tick, round(tick), abs_tol=1e-9) for tick in scale.ticks)
    if from_zero:
        assert scale.low <= 0 <= scale.high
    if rounded and not whole:
        assert len(scale.ticks) >= 3
        assert (scale(scale.ticks[0]), scale(scale.ticks[-1])) == (pytest.approx(10), pytest.approx(110))


@given(st.lists(POSITIVE, min_size=1, max_size=20))
def test_log_ticks_are_inside_and_few(values: list[float]) -> None:
    scale = make_scale(values, Axis("y", log=True), 100.0, 0.0)
    assert all(-1e-6 <= scale(value) <= 100 + 1e-6 for value in values)
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks)
    assert len(scale.ticks) <= 7
    labels = tick_labels(scale)
    assert [float(label.replace(",", "")) for label in labels] == pytest.approx(scale.ticks)


@given(st.floats(0.01, 1e5), st.floats(0.01, 1e5))
def test_linear_labels_say_what_the_ticks_are(low: float, high: float) -> None:
    scale = make_scale([low, high], Axis("y"), 0.0, 1.0)
    labels = [float(label.replace(",", "")) for label in tick_labels(scale)]
    assert labels == pytest.approx(scale.ticks, abs=1e-3 * (scale.high - scale.low))


def test_log_only_for_wide_positive_values() -> None:
    assert suits_log([1.0, 20.0])
    assert not any(map(suits_log, ([], [0.0, 100.0], [1.0, 19.0], [-1.0, 50.0])))


@given(st.lists(FINITE, min_size=1, max_size=300), st.integers(6, 60))
def test_thinning_keeps_ends_and_extremes(values: list[float], limit: int) -> None:
    points = list(enumerate(values))
    kept = thin(points, limit)
    heights = [value for _, value in kept]
    assert len(kept) <= limit
    assert set(kept) <= set(points)
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert (min(heights), max(heights)) == (min(values), max(values))


@given(st.lists(st.floats(34, 200), min_size=1, max_size=5))
def test_end_labels_never_overlap_and_stay_inside(wanted: list[float]) -> None:
    heights = spread_labels(sorted(wanted), 34.0, 200.0)
    assert all(below - above >= 17 - 1e-9 for above, below in pairwise(heights))
    assert heights[0] >= 34 - 1e-9
    assert heights[-1] <= 200 + 1e-9


@pytest.mark.parametrize("log", [False, True])
def test_values_read_off_the_axes_are_the_data(log: bool) -> None:
    points = ((0.0, 412.3), (5.0, 33.7), (12.0, 2.9), (30.0, 17.0))
    chart = line_chart(
        [Series("loss", points)],
        title="Loss",
        description="",
        x=Axis("round", whole=True, rounded=False),
        y=Axis("loss", log=log),
    )
    root = ElementTree.fromstring(chart)
    marks = [(float(m.attrib["cx"]), float(m.attrib["cy"])) for m in root.iter("circle") if "mark" in m.attrib["class"]]
    left, bottom = _read_axis(root, "end", "y"), _read_axis(root, "middle", "x")
    for (x, y), (place, value) in zip(marks, points, strict=True):
        assert _interpolate(bottom, x, log=False) == pytest.approx(place, abs=0.05)
        # Tick labels sit 4 units below their lines; a tenth of a pixel is the drawing's precision.
        assert _interpolate(left, y + 4, log=log) == pytest.approx(value, rel=5e-3, abs=0.0 if log else 0.3)


def test_each_place_has_a_tooltip_with_every_value() -> None:
    first = Series("released", ((1.0, 0.5), (2.0, 0.25)))
    second = Series("devices", ((2.0, 0.75),), tone="b")
    chart = line_chart([first, second], title="T", description="", x=Axis("round"), y=Axis("norm"))
    tips = [tip.text for tip in ElementTree.fromstring(chart).findall(".//g[@class='probes']/g/title")]
    assert tips == ["at 1\nreleased 0.5", "at 2\nreleased 0.25\ndevices 0.75"]


def test_long_series_are_bounded_in_size() -> None:
    points = tuple((float(i), math.sin(i)) for i in range(20_000))
    chart = line_chart([Series("s", points)], title="T", description="", x=Axis("round"), y=Axis("v"))
    root = ElementTree.fromstring(chart)
    assert len(root.findall(".//g[@class='probes']/g")) <= 120
    assert not [mark for mark in root.iter("circle") if "mark" in mark.attrib["class"]]
    assert len(chart) < 60_000


def test_a_reference_is_drawn_and_widens_the_axis() -> None:
    series = [Series("norm", ((1.0, 0.1), (2.0, 0.2)))]
    chart = line_chart(
        series, title="T", description="", x=Axis("r"), y=Axis("n"), reference=Reference(5.0, "clip norm 5")
    )
    root = ElementTree.fromstring(chart)
    assert "clip norm 5" in [text.text for text in root.iter("text")]
    level = next(line for line in root.iter("line") if line.attrib.get("class") == "reference")
    assert float(level.attrib["y1"]) >= 34


def test_bars_are_proportional_from_zero() -> None:
    bars = [Bar("a", 200, "200", ""), Bar("b", 50, "50", "", hatched=True), Bar("c", 0, "0", "")]
    root = ElementTree.fromstring(bar_chart(bars, title="Bytes", description=""))
    drawn = [g.findall("rect")[1] for g in root.findall("g")]
    widths = [float(bar.attrib["width"]) for bar in drawn]
    assert widths == pytest.approx([widths[0], widths[0] / 4, 0.0], abs=0.1)
    hatch = drawn[1].attrib["fill"]
    assert hatch == f"url(#{root.find('.//pattern').attrib['id']})"  # type: ignore[union-attr]


@given(st.floats(1e-6, 1e6))
def test_a_printed_bound_holds_and_is_tight(value: float) -> None:
    printed = float(bound(value).replace(",", ""))
    assert printed >= value * (1 - 1e-11)
    assert printed <= value * 1.0011


@given(st.floats(1e-12, 1e12), st.integers(2, 6))
def test_a_figure_is_within_its_digits(value: float, digits: int) -> None:
    assert float(figure(value, digits).replace(",", "")) == pytest.approx(value, rel=0.51 * 10.0 ** (1 - digits))


def test_figures_that_are_not_numbers() -> None:
    assert {figure(None), figure(math.inf), figure(math.nan), *column([None, math.nan])} == {"\u2013"}
    assert column([1e30, 2.0]) == ["1e30", "2"]
    assert (figure(0.0), data_size(0)) == ("0", "0 B")


def _read_axis(root: ElementTree.Element, anchor: str, direction: str) -> list[tuple[float, float]]:
    labels = [t for t in root.iter("text") if t.attrib.get("text-anchor") == anchor and "class" not in t.attrib]
    return [(float(label.attrib[direction]), float((label.text or "").replace(",", ""))) for label in labels]


def _interpolate(ticks: list[tuple[float, float]], pixel: float, *, log: bool) -> float:
    (p0, v0), (p1, v1) = ticks[0], ticks[-1]
    share = (pixel - p0) / (p1 - p0)
    return v0 * (v1 / v0) ** share if log else v0 + share * (v1 - v0)
