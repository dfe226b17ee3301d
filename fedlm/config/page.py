"""docs/configuration.md as text: every key of the config with its default, its range and its meaning.

`fedlm config show --markdown` prints it; a test holds the page to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from fedlm.config.keys import Key, keys, keys_of_options, show
from fedlm.config.schema import Config
from fedlm.registry import REGISTRIES, NoOptions, Registry

_HEAD = """# Configuration

Every key of the TOML file and of `--set KEY=VALUE`: its default, what it accepts, what it means. This page is made by
`fedlm config show --markdown > docs/configuration.md`; `fedlm config show my.toml` prints the values of your config.
`fedlm simulate` without a file starts from `simulations/recipes/default.toml`, which differs from the defaults below.
"""
_COLUMNS = ("key", "default", "allowed", "meaning")


def configuration_page() -> str:
    """Return the page as Markdown that ends with a line break."""
    return "\n".join([_HEAD, *_sections(), *_options()]).rstrip("\n") + "\n"


def _sections() -> Iterator[str]:
    """Yield a heading, what the section is, and a table of its keys for each section of the file."""
    hints = get_type_hints(Config)
    yield from ("## Top level", "", *_table(key for path, key in keys().items() if "." not in path), "")
    for item in fields(Config):
        section = hints[item.name]
        if is_dataclass(section):
            title = f"## [{item.name}]"
            inside = (key for path, key in keys().items() if path.startswith(f"{item.name}."))
            yield from (title, "", _cell(inspect.getdoc(section) or ""), "", *_table(inside), "")


def _options() -> Iterator[str]:
    """Yield the options of every built-in class that has some, under the key that names the class."""
    words = "Options of the built-in class that a key names; [parts of your own](plugins.md) bring theirs."
    yield from ("## Options", "", words, "")
    for registry in REGISTRIES:
        found = [(name, _options_of(registry, name)) for name in registry.built_in]
        for name, options in found:
            if options:
                yield from (f"### {registry.key} = {_named(registry, name)}", "", *_table(options), "")


def _options_of(registry: Registry[Any], name: str) -> list[Key]:
    options = registry.options_of(name)
    if options is NoOptions:
        return []
    middle = f".{registry.short_name(name)}" if registry.many else ""
    return list(keys_of_options(options, f"{registry.options_key}{middle}.").values())


def _named(registry: Registry[Any], name: str) -> str:
    return f'["{name}"]' if registry.many else f'"{name}"'


def _table(rows: Iterable[Key]) -> Iterator[str]:
    yield f"| {' | '.join(_COLUMNS)} |"
    yield "|---|---|---|---|"
    for key in rows:
        yield f"| `{key.path}` | `{show(key.default)}` | {_cell(key.allowed)} | {_cell(key.help)} |"


def _cell(text: str) -> str:
    """Return text as one cell: no line break, and nothing that Markdown would take for its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")
