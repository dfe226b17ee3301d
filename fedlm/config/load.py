"""One TOML file and `--set` overrides become one checked `Config`, and back.

>>> config = load_config(None, ["trainable.lora.rank=4", "local.learning_rate=1"])
>>> config.trainable.lora.rank, config.local.learning_rate
(4, 1.0)
>>> config_from_toml(config_to_toml(config)) == config
True
>>> load_config(None, ["trainable.lora.rnak=4"])
Traceback (most recent call last):
fedlm.errors.ConfigError: unknown key 'trainable.lora.rnak'; did you mean 'trainable.lora.rank'?
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import tomli_w

from fedlm.config.keys import build, flatten, show, to_flat
from fedlm.config.schema import Config
from fedlm.config.validate import validate
from fedlm.errors import ConfigError
from fedlm.plugins import search_in


def load_config(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Config:
    """Return the config of a TOML file with overrides on top; plug-ins beside the file are found from now on.

    Arguments:
        path: The file; None means the defaults of the schema.
        overrides: `a.b=v` each, later ones win; `v` is a TOML value, or else bare text.

    Raises:
        ConfigError: The file cannot be read or is no TOML, an unknown key, a value that is not allowed, or a
            combination that cannot work (`fedlm.config.validate`).
    """
    file = None if path is None else Path(path)
    search_in([Path() if file is None else file.parent, Path()])
    values = {} if file is None else dict(flatten(_parse(_read(file), str(file))))
    for override in overrides:
        values.update(_parse_override(override))
    return _checked(values)


def config_from_toml(text: str, *, imports_plugins: bool = True) -> Config:
    """Return the config of a TOML text; raises ConfigError like `load_config`.

    Arguments:
        text: The TOML.
        imports_plugins: False on nodes: what a text says of classes that are not built in has been checked by who sent
            it, and a node needs only those plug-ins that it uses.
    """
    return _checked(dict(flatten(_parse(text, "config"))), imports_plugins=imports_plugins)


def config_to_toml(config: Config) -> str:
    """Return the complete config, defaults included, as TOML that loads to an equal config."""
    tables: dict[str, Any] = {}
    for path, value in to_flat(config).items():
        *sections, leaf = path.split(".")
        table = tables
        for section in sections:
            table = table.setdefault(section, {})
        table[leaf] = value
    return tomli_w.dumps(tables)


def config_hash(config: Config) -> str:
    """Return 12 hexadecimal digits that two configs share exactly when all their values are equal."""
    canonical = json.dumps(to_flat(config), sort_keys=True, separators=(",", ":"))
    return sha256(canonical.encode()).hexdigest()[:12]


def _checked(values: dict[str, object], *, imports_plugins: bool = True) -> Config:
    config = build(values, imports_plugins=imports_plugins)
    validate(config, imports_plugins=imports_plugins)
    return config


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # editors on Windows write a byte-order mark
    except FileNotFoundError:
        raise ConfigError(f"config file {str(path)!r} does not exist") from None
    except IsADirectoryError:
        raise ConfigError(f"config file {str(path)!r} is a folder; name a TOML file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {str(path)!r} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"config file {str(path)!r} cannot be read: {reason}") from None


def _parse(text: str, source: str) -> dict[str, object]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError without a place: an integer of too many digits
        message, line, column = _place(str(error), text)
        raise ConfigError(f"{source}: broken TOML at line {line}, column {column}: {message}") from None


def _place(message: str, text: str) -> tuple[str, int, int]:
    """Split tomllib's message into what and where; "end of document" becomes the last line and column."""
    if found := re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", message, re.DOTALL):
        return found[1], int(found[2]), int(found[3])
    lines = text.split("\n")
    return message.removesuffix(" (at end of document)"), len(lines), len(lines[-1]) + 1


def _parse_override(override: str) -> dict[str, object]:
    path, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not path:
        raise ConfigError(f"--set {show(override)} is not allowed; expected KEY=VALUE, such as --set seed=3")
    try:
        override.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--set {path} = {show(text)[:60]!a} is not allowed; expected UTF-8 text") from None
    return dict(flatten(_parse_value(text), path))


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Return options of a class from `key=value` words, unchecked; raises ConfigError for other words."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = (part.strip() for part in word.partition("="))
        if not equals or not name:
            raise ConfigError(f"--option {show(word)} is not allowed; expected KEY=VALUE, such as --option bands=8")
        found[name] = _parse_value(text)
    return found


def _parse_value(text: str) -> object:
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text  # a line break in the text could start a second key
