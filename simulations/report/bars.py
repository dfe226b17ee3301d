"""Horizontal bar charts in SVG: names above the bars, values beside them, failures hatched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulations.report.lines import WIDTH
from simulations.report.markup import Markup, element, join, slug, svg, text

_ROW = 44.0
_BAR = 14.0
_VALUE_WIDTH = 150.0


@dataclass(frozen=True)
class Bar:
    """One bar.

    Arguments:
        label: Its name.
        value: Its length, zero or more.
        shown: The value as text.
        hover: The tooltip.
        hatched: Drawn hatched in the warning tone: a failure.
    """

    label: str
    value: float
    shown: str
    hover: str
    hatched: bool = False


def bar_chart(bars: Sequence[Bar], *, title: str, description: str) -> Markup:
    """Return a horizontal bar chart, in the order given, on a linear scale from zero.

    Arguments:
        bars: At least one.
        title: Its name, unique on the page.
        description: What it shows, for a screen reader.

    Returns:
        An inline SVG.
    """
    longest = max(bar.value for bar in bars) or 1.0
    pattern = f"{slug(title)}-hatch"
    rows = [_bar(bar, index, bar.value / longest, pattern) for index, bar in enumerate(bars)]
    return svg(title, description, WIDTH, _ROW * len(bars) + 4, _hatch(pattern), join(rows))


def _bar(bar: Bar, index: int, share: float, pattern: str) -> Markup:
    top = index * _ROW
    # Every non-empty bar stays visible, and none reaches the column of values.
    width = max(share * (WIDTH - _VALUE_WIDTH), 2.0 if bar.value else 0.0)
    fill = f"url(#{pattern})" if bar.hatched else None
    return element(
        "g",
        text("title", bar.hover),
        text("text", bar.label, x=0, y=top + 16, class_="bar-name"),
        element("rect", x=0, y=top + 23, width=WIDTH - _VALUE_WIDTH, height=_BAR, rx=3, class_="track"),
        element(
            "rect",
            x=0,
            y=top + 23,
            width=width,
            height=_BAR,
            rx=3,
            fill=fill,
            class_=None if bar.hatched else "bar",
        ),
        text("text", bar.shown, x=WIDTH - _VALUE_WIDTH + 12, y=top + 35, class_="bar-value"),
    )


def _hatch(name: str) -> Markup:
    return element(
        "defs",
        element(
            "pattern",
            element("rect", width=6, height=6, class_="hatch-ground"),
            element("rect", width=2.5, height=6, class_="hatch-line"),
            id=name,
            width=6,
            height=6,
            patternUnits="userSpaceOnUse",
            patternTransform="rotate(45)",
        ),
    )
