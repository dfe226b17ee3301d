"""HTML and SVG as text that is escaped by construction.

`Markup` is a type of its own: `element` takes only `Markup` as children, so a plain string that was not
escaped does not pass the type checker. The output is also well-formed XML.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape as _escape_html
from typing import NewType

Markup = NewType("Markup", str)

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_VOID = {"meta", "path", "line", "rect", "circle"}


def escape(text: str) -> Markup:
    """Return text as markup; characters that XML forbids (controls, lone surrogates) become U+FFFD."""
    return Markup(_escape_html(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)))


def element(name: str, /, *children: Markup, **attributes: str | float | None) -> Markup:
    """Return one element.

    Arguments:
        name: The tag.
        children: Its content, in order.
        attributes: `class_` is `class`, `aria_label` is `aria-label`; numbers are rounded to a tenth, None is
            left out.

    Returns:
        The element as markup.

    >>> element("p", escape("1 < 2"), class_="note")
    '<p class="note">1 &lt; 2</p>'
    """
    opening = "".join([name, *(_attribute(key, value) for key, value in attributes.items() if value is not None)])
    if name in _VOID and not children:
        return Markup(f"<{opening}/>")
    return Markup(f"<{opening}>{join(children)}</{name}>")


def text(name: str, content: str, /, **attributes: str | float | None) -> Markup:
    """Return an element that holds escaped text."""
    return element(name, escape(content), **attributes)


def join(parts: Iterable[Markup]) -> Markup:
    """Return markup one after the other."""
    return Markup("".join(parts))


def svg(title: str, description: str, width: float, height: float, *children: Markup) -> Markup:
    """Return an SVG image that scales with its column and tells a screen reader what it shows.

    Arguments:
        title: Its name, unique on the page.
        description: What a reader should take from it, in a sentence.
        width: Of the drawing, in user units (pixels at full size).
        height: Likewise.
        children: What is drawn.

    Returns:
        An inline `svg` element.
    """
    name = slug(title)
    return element(
        "svg",
        text("title", title, id=f"{name}-title"),
        text("desc", description, id=f"{name}-desc"),
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )


def slug(title: str) -> str:
    """Return a title as an id.

    >>> slug("Bits per byte, by round")
    'bits-per-byte-by-round'
    """
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _attribute(key: str, value: str | float) -> str:
    shown = value if isinstance(value, str) else f"{round(value, 1):.10g}"
    return f' {key.rstrip("_").replace("_", "-")}="{escape(shown)}"'
