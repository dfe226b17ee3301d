"""One experiment as one frozen, checked object: the schema, its TOML file, overrides, hash and help.

Names are loaded when they are asked for: `fedlm.registry` needs one module of this package, which needs the registry.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlm.config.keys import describe
    from fedlm.config.load import config_from_toml, config_hash, config_to_toml, load_config
    from fedlm.config.schema import Config

__all__ = [
    "Config",
    "config_from_toml",
    "config_hash",
    "config_to_toml",
    "describe",
    "load_config",
]

_MODULES = {"Config": "schema", "describe": "keys"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'load')}"), name)
