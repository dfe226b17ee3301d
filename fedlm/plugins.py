"""Objects by name: `pkg.mod:attribute`, of an installed package or of a module beside the config file.

Folders with plug-ins come last on Python's search path, so that a user's own `server.py` shadows nothing. The other way
round, a plug-in module whose name something else already has would never be read: that is an error that says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from fedlm.errors import ConfigError

_folders: list[str] = []


def search_in(folders: Iterable[str | Path]) -> None:
    """Find plug-in modules in these folders too, after everything that is importable without them."""
    for folder in folders:
        try:
            path = str(Path(folder).resolve())
        except (OSError, ValueError):  # a working folder that is gone, a name that no folder can have
            continue
        if not Path(path).is_dir():
            continue
        if path not in _folders:
            _folders.append(path)
        if path not in sys.path:
            sys.path.append(path)
            importlib.invalidate_caches()


def folders_of(references: Iterable[str]) -> tuple[str, ...]:
    """Return those of the folders given to `search_in` that have a module of some `pkg.mod:attribute`."""
    names = {reference.partition(":")[0].partition(".")[0] for reference in references}
    return tuple(folder for folder in _folders if any(PathFinder.find_spec(name, [folder]) for name in names if name))


def refuse_shadows() -> None:
    """Refuse a search path on which somebody's own module hides a package of this project.

    Raises:
        ConfigError: It would fail anyway, but with a message about a missing name.
    """
    home = Path(__file__).parents[1]
    for name in ("clients", "server", "simulations"):
        found = _origin(name)
        if found is None or Path(found).resolve().parent != (home / name).resolve():
            raise ConfigError(
                f"{found or name} hides the package {name!r} of fedlm; rename it or take its folder off PYTHONPATH: "
                "plug-ins beside the config file are found without"
            )


def load_object(reference: str, key: str) -> Any:
    """Import `pkg.mod:attribute`.

    Arguments:
        reference: What the config says.
        key: The config key that says it, for the message.

    Raises:
        ConfigError: It is not of that form, cannot be imported, or its module is hidden by another of the same name.
    """
    module, separator, attribute = reference.partition(":")
    if not separator or not module or not attribute:
        raise ConfigError(f"{key} = {reference!r} is not of the form pkg.mod:name")
    _refuse_hidden(module.partition(".")[0], reference, key)
    try:
        return import_object(reference)
    except Exception as error:  # whatever a plug-in raises when it is imported
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ImportError | AttributeError) else error
        raise ConfigError(
            f"{key} = {reference!r} cannot be imported: {' '.join(str(reason).split())}; plug-ins are looked for "
            "beside the config file, in the working folder and on PYTHONPATH"
        ) from error


def import_object(reference: str) -> Any:
    """Import `pkg.mod:attribute` of this package or of one that is known to be there; raises what importing raises."""
    module, _, attribute = reference.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _refuse_hidden(name: str, reference: str, key: str) -> None:
    """Refuse a plug-in whose top-level module would be read from elsewhere than the folder that it lies in."""
    own = PathFinder.find_spec(name, list(_folders))
    if own is None or own.origin is None:  # lies in no folder of plug-ins, or is a folder without __init__.py
        return
    found = getattr(sys.modules.get(name), "__file__", None) if name in sys.modules else _origin(name)
    if found is None or Path(found).resolve() != Path(own.origin).resolve():
        raise ConfigError(
            f"{key} = {reference!r} means {own.origin}, but Python already has a module {name!r} "
            f"({found or 'built in'}); rename the file"
        )


def _origin(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    return spec.origin if spec else None
