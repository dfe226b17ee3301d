"""Plug-ins by name: `pkg.mod:attribute`."""

from __future__ import annotations

import importlib
from typing import Any

from fedlm.errors import ConfigError


def load_object(reference: str, key: str) -> Any:
    """Import `pkg.mod:attribute`.

    Arguments:
        reference: What the config says.
        key: The config key that says it, for the message.

    Raises:
        ConfigError: It is not of that form, or cannot be imported.
    """
    module, separator, attribute = reference.partition(":")
    if not separator or not module or not attribute:
        raise ConfigError(f"{key} = {reference!r} is not of the form pkg.mod:name")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key} = {reference!r} cannot be imported: {error}; is its folder on PYTHONPATH?") from error
