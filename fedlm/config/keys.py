"""The keys of a config as data: one walk over the dataclasses of `fedlm.config.schema` gives them all.

Nothing here knows a single key by name: types, ranges, choices and help come from the fields, so a key added
to the schema is loaded, checked, suggested, written, hashed and shown without a line of code. The options of the
classes that a config names (`fedlm.registry`) are keys like any other, once it is known which classes these are.

>>> keys()["trainable.lora.rank"].allowed
'a whole number from 0 to 1_024'
>>> keys()["privacy.delta"].coerce(1)
Traceback (most recent call last):
fedlm.errors.ConfigError: privacy.delta = 1 is not allowed; expected a number > 0 and <= 0.1
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from operator import attrgetter
from typing import Any, get_type_hints

from fedlm.config.schema import Config, OptionValues
from fedlm.errors import ConfigError
from fedlm.plugins import search_in
from fedlm.registry import REGISTRIES, NoOptions, Registry
from fedlm.suggest import nearest_key, nearest_word

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text, not empty"}


@dataclass(frozen=True)
class Key:
    """One key of the config file.

    Arguments:
        path: The dotted name, `trainable.lora.rank`.
        kind: The annotated type: bool, int, float, str or `tuple[str, ...]`.
        default: The value of a config that does not name the key.
        help: One sentence.
        low, high, above: Inclusive and exclusive bounds of a number, or None.
        choices: The allowed words; empty when any text will do.
        registry: What the key names classes of; None for other keys.
    """

    path: str
    kind: Any
    default: object
    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    registry: Registry[Any] | None = None

    @property
    def allowed(self) -> str:
        """What the key accepts, in words."""
        if self.registry:
            return self.registry.allowed
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind is str and self.default == "":
            return "text"
        kind = _KINDS.get(self.kind, "a list of text")
        if self.low is not None and self.high is not None:
            return f"{kind} from {self.low:_} to {self.high:_}"
        bounds = [("> ", self.above), (">= ", self.low), ("<= ", self.high)]
        words = [f"{sign}{bound:_}" for sign, bound in bounds if bound is not None]
        return f"{kind} {' and '.join(words)}".rstrip()

    def coerce(self, value: object) -> object:
        """Return `value` in the type of this key: integers become floats where a float belongs, lists tuples.

        Raises:
            ConfigError: A wrong type, a number out of range or not finite, a word that is no choice.
        """
        typed = self._typed(value)
        if typed is None or not self._in_range(typed):
            raise ConfigError(f"{self.path} = {show(value)} is not allowed; expected {self.allowed}{self._hint(value)}")
        return typed

    def _typed(self, value: object) -> object | None:
        if self.kind is bool:
            return value if isinstance(value, bool) else None
        if self.kind is str:
            return value if isinstance(value, str) and (value or self.default == "") else None
        if self.kind in (int, float):
            return self._number(value)
        if not isinstance(value, list | tuple) or not all(isinstance(word, str) and word for word in value):
            return None
        return tuple(value)

    def _number(self, value: object) -> int | float | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if isinstance(value, int) and value.bit_length() > 63:  # TOML integers are signed 64-bit
            return None
        if self.kind is int:
            return value if isinstance(value, int) else None
        # + 0.0 turns -0.0 into 0.0: equal configs must have equal hashes.
        return float(value) + 0.0 if math.isfinite(value) else None

    def _in_range(self, value: object) -> bool:
        if self.choices:
            return value in self.choices
        if not isinstance(value, int | float):
            return True
        above_low = self.low is None or value >= self.low
        return above_low and (self.high is None or value <= self.high) and (self.above is None or value > self.above)

    def _hint(self, value: object) -> str:
        """The fix, where the value shows what was meant."""
        if isinstance(value, str) and (word := nearest_word(value, self.choices)):
            return f"; did you mean {word!r}?"
        if isinstance(value, str) and value and self.kind not in _KINDS:
            return f"; write {show([value])}"
        if isinstance(value, int) and value.bit_length() > 63:
            return "; TOML integers have 64 bits"
        if self.kind is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
            return f"; write {int(value):_}"
        if self.kind is str and not isinstance(value, str | dict) and not self.choices:
            return "; quote it"
        return ""


def show(value: object) -> str:
    """Return a value from a config file as one short line."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:  # an integer of more digits than Python converts
        text = "(a very long number)"
    return text if len(text) <= 60 else f"{text[:57]}..."


@cache
def keys() -> dict[str, Key]:
    """Return every key of the schema by its dotted name, in its order; options of chosen classes are not among them."""
    return {key.path: key for key in _walk(Config, "")}


@cache
def sections() -> frozenset[str]:
    """Return the dotted names of the sections; the top one is the empty string."""
    parents = [path.split(".")[:-1] for path in keys()]
    return frozenset(".".join(parent[:depth]) for parent in parents for depth in range(len(parent) + 1))


@cache
def option_sections() -> tuple[str, ...]:
    """Return the dotted names of the sections that hold options of the classes that a config names."""
    return tuple(registry.options_key for registry in REGISTRIES if registry.options_key)


def option_keys(config: Config) -> dict[str, Key]:
    """Return the keys of the options that the classes of a config have, by dotted name.

    Raises:
        ConfigError: A class that does not exist.
    """
    found: dict[str, Key] = {}
    for registry in REGISTRIES:
        for name in chosen(config, registry) if registry.options_key else ():
            found |= keys_of_options(registry.options_of(name), _prefix(registry, name))
    return found


@cache
def keys_of_options(options: type, prefix: str) -> dict[str, Key]:
    """Return the keys of a dataclass of options by dotted name; `prefix` ends with a dot."""
    return {key.path: key for key in _walk(options, prefix)}


def chosen(config: Config, registry: Registry[Any]) -> tuple[str, ...]:
    """Return the names that a config gives for the key of a registry; none for an empty text."""
    value = attrgetter(registry.key)(config)
    return tuple(value) if registry.many else (value,) if value else ()


def typed_options(kind: type, values: Mapping[str, Any], section: str) -> Any:
    """Return an instance of a class's `Options`: the values that a config has, and defaults for the others.

    Arguments:
        kind: A class with the attribute `Options`.
        values: By the option's name.
        section: The section that they are written in, for messages.

    Raises:
        ConfigError: An option that the class does not have, or a value that is not allowed.
    """
    options = getattr(kind, "Options", NoOptions)
    known = keys_of_options(options, f"{section}.")
    for name in values:
        if f"{section}.{name}" not in known:
            raise _unknown_option(f"{section}.{name}", known, kind.__name__)
    return options(**{name: known[f"{section}.{name}"].coerce(value) for name, value in values.items()})


def flatten(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted keys of a nested table with their raw values.

    Raises:
        ConfigError: A key that does not exist, or a value where a section belongs; options are checked later, when the
            class that they are of is known.
    """
    is_open = path in option_sections()
    if path in keys() or (_is_option(path) and not isinstance(value, dict)):
        yield path, value
    elif path not in sections() and not is_open and not _is_option(path):
        raise _unknown(path)
    elif not isinstance(value, dict):
        raise ConfigError(f"{path} = {show(value)} is not allowed; expected a table: {path} is a section")
    else:
        for name, inner in value.items():
            if "." in name:
                raise ConfigError(f"unknown key {show(name)}; a key with dots is written without quotes")
            yield from flatten(inner, f"{path}.{name}" if path else name)


def build(values: dict[str, object], *, imports_plugins: bool = True) -> Config:
    """Return the config that has `values` (by dotted key) over the defaults, each value checked.

    Arguments:
        values: By dotted key.
        imports_plugins: Also check the options of classes that are not built in, which imports them; without it such
            options are taken as they are, for nodes that need not have every plug-in of the server.

    Raises:
        ConfigError: A value of the wrong type, out of range, or no choice; a class or an option that does not exist.
    """
    config: Config = _build(Config, "", values)
    search_in(config.plugin_folders)
    for registry in REGISTRIES:
        if registry.options_key:
            config = _with_options(config, registry, _options(config, registry, values, imports_plugins))
        elif imports_plugins:
            for name in chosen(config, registry):
                registry.options_of(name)
    return config


def to_flat(config: Config) -> dict[str, object]:
    """Return every value of a config by its dotted key, each value checked and in its key's type; options last."""
    flat = {path: key.coerce(attrgetter(path)(config)) for path, key in keys().items()}
    return flat | {path: key.coerce(_option(config, path, key)) for path, key in option_keys(config).items()}


def describe(config: Config) -> list[dict[str, object]]:
    """Return every key with `key`, `value`, `default`, `allowed` and `help`; options after the keys of the schema."""
    every = [(path, key, attrgetter(path)(config)) for path, key in keys().items()]
    every += [(path, key, _option(config, path, key)) for path, key in option_keys(config).items()]
    return [
        {"key": path, "value": value, "default": key.default, "allowed": key.allowed, "help": key.help}
        for path, key, value in every
    ]


def _walk(section: type, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(section)
    for item in fields(section):
        path = f"{prefix}{item.name}"
        if is_dataclass(hints[item.name]):
            yield from _walk(hints[item.name], f"{path}.")
        elif hints[item.name] is not OptionValues:
            registry = next((found for found in REGISTRIES if found.key == path), None)
            yield Key(path, hints[item.name], item.default, **item.metadata, registry=registry)


def _build(section: type, prefix: str, values: dict[str, object]) -> Any:
    hints = get_type_hints(section)
    arguments = {}
    for item in fields(section):
        path = f"{prefix}{item.name}"
        if is_dataclass(hints[item.name]):
            arguments[item.name] = _build(hints[item.name], f"{path}.", values)
        elif path in values:
            arguments[item.name] = keys()[path].coerce(values[path])
    return section(**arguments)


def _is_option(path: str) -> bool:
    return path.startswith(tuple(f"{section}." for section in option_sections()))


def _prefix(registry: Registry[Any], name: str) -> str:
    """Return what the dotted names of the options of a chosen class begin with."""
    return f"{registry.options_key}.{registry.short_name(name)}." if registry.many else f"{registry.options_key}."


def _option(config: Config, path: str, key: Key) -> object:
    section = next(section for section in option_sections() if path.startswith(f"{section}."))
    values: OptionValues = attrgetter(section)(config)
    return values.get(path.removeprefix(f"{section}."), key.default)


def _options(
    config: Config, registry: Registry[Any], values: dict[str, object], imports_plugins: bool
) -> dict[str, object]:
    """Return the options of a registry's classes that `values` has, without those that equal their defaults."""
    start = f"{registry.options_key}."
    given = {path.removeprefix(start): value for path, value in values.items() if path.startswith(start)}
    names = chosen(config, registry)
    if not imports_plugins and not set(names) <= set(registry.built_in):
        return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    known: dict[str, Key] = {}
    for name in names:
        known |= keys_of_options(registry.options_of(name), _prefix(registry, name))
    for name in given:
        if start + name not in known:
            raise _unknown_option(start + name, known, ", ".join(names) or registry.noun)
    typed = {name: known[start + name].coerce(value) for name, value in given.items()}
    return {name: value for name, value in typed.items() if value != known[start + name].default}


def _with_options(config: Config, registry: Registry[Any], options: dict[str, object]) -> Config:
    changed: Any = OptionValues(options)
    path = registry.options_key
    while path:
        section, _, leaf = path.rpartition(".")
        changed = replace(attrgetter(section)(config) if section else config, **{leaf: changed})
        path = section
    result: Config = changed
    return result


def _unknown(path: str) -> ConfigError:
    options = [key for registry in REGISTRIES for key in _built_in_option_keys(registry)]
    nearest = nearest_key(path, [*keys(), *options])
    fix = f"did you mean {nearest!r}?" if nearest else "`fedlm config show` lists every key"
    return ConfigError(f"unknown key {show(path)[1:-1]!r}; {fix}")


def _unknown_option(path: str, known: Mapping[str, Key], owner: str) -> ConfigError:
    nearest = nearest_key(path, known)
    listed = f"the options of {owner} are {', '.join(known)}" if known else f"{owner} has no options"
    return ConfigError(f"unknown key {show(path)[1:-1]!r}; " + (f"did you mean {nearest!r}?" if nearest else listed))


def _built_in_option_keys(registry: Registry[Any]) -> list[str]:
    if not registry.options_key:
        return []
    return [
        path
        for name in registry.built_in
        for path in keys_of_options(registry.options_of(name), _prefix(registry, name))
    ]
