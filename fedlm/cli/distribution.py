"""This package's own version and requirements, installed or in a source tree."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any


def version() -> str:
    """Return the version of fedlm."""
    try:
        return metadata.version("fedlm")
    except metadata.PackageNotFoundError:
        return str(_project()["version"])


def requirements() -> list[str]:
    """Return the requirements of fedlm, those of extras with their marker or not at all."""
    try:
        return metadata.requires("fedlm") or []
    except metadata.PackageNotFoundError:
        return [str(line) for line in _project()["dependencies"]]


def _project() -> dict[str, Any]:
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    project: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    return project
