"""The keys of a config as data: one walk over the dataclasses of `fedlm.config.schema` gives them all.

Nothing here knows a single key by name: types, ranges, choices and help come from the fields, so a key added
to the schema is loaded, checked, suggested, written, hashed and shown without a line of code.

>>> keys()["trainable.lora.rank"].allowed
'a whole number from 0 to 1_024'
>>> keys()["privacy.delta"].coerce(1)
Traceback (most recent call last):
fedlm.errors.ConfigError: privacy.delta = 1 is not allowed; expected a number > 0 and <= 0.1
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from operator import attrgetter
from typing import Any, get_type_hints

from fedlm.config.schema import Config
from fedlm.config.suggest import nearest_key, nearest_word
from fedlm.errors import ConfigError

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
    """

    path: str
    kind: Any
    default: object
    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """What the key accepts, in words."""
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
    """Return every key of the config by its dotted name, in the order of the schema."""
    return {key.path: key for key in _walk(Config, "")}


@cache
def sections() -> frozenset[str]:
    """Return the dotted names of the sections; the top one is the empty string."""
    parents = [path.split(".")[:-1] for path in keys()]
    return frozenset(".".join(parent[:depth]) for parent in parents for depth in range(len(parent) + 1))


def flatten(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted keys of a nested table with their raw values.

    Raises:
        ConfigError: A key that does not exist, or a value where a section belongs.
    """
    if path in keys():
        yield path, value
    elif path not in sections():
        raise _unknown(path)
    elif not isinstance(value, dict):
        raise ConfigError(f"{path} = {show(value)} is not allowed; expected a table: {path} is a section")
    else:
        for name, inner in value.items():
            if "." in name:
                raise ConfigError(f"unknown key {show(name)}; a key with dots is written without quotes")
            yield from flatten(inner, f"{path}.{name}" if path else name)


def build(values: dict[str, object]) -> Config:
    """Return the config that has `values` (by dotted key) over the defaults, each value checked.

    Raises:
        ConfigError: A value of the wrong type, out of range, or no choice.
    """
    config: Config = _build(Config, "", values)
    return config


def to_flat(config: Config) -> dict[str, object]:
    """Return every value of a config by its dotted key, each value checked and in its key's type."""
    return {path: key.coerce(attrgetter(path)(config)) for path, key in keys().items()}


def describe(config: Config) -> list[dict[str, object]]:
    """Return every key with `key`, `value`, `default`, `allowed` and `help`, in the order of the schema."""
    return [
        {
            "key": path,
            "value": attrgetter(path)(config),
            "default": key.default,
            "allowed": key.allowed,
            "help": key.help,
        }
        for path, key in keys().items()
    ]


def _walk(section: type, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(section)
    for item in fields(section):
        path = f"{prefix}{item.name}"
        if is_dataclass(hints[item.name]):
            yield from _walk(hints[item.name], f"{path}.")
        else:
            yield Key(path, hints[item.name], item.default, **item.metadata)


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


def _unknown(path: str) -> ConfigError:
    nearest = nearest_key(path, keys())
    fix = f"did you mean {nearest!r}?" if nearest else "`fedlm config show` lists every key"
    return ConfigError(f"unknown key {show(path)[1:-1]!r}; {fix}")
