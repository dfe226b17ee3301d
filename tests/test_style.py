"""The tree is formatted, linted and typed; layers import downward only; every file keeps its size."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fedlm", "clients", "server", "simulations")
# Which packages a package may import (docs/how_it_works.md); the command line alone may import all.
MAY_IMPORT = {
    "fedlm": {"fedlm"},
    "clients": {"fedlm", "clients"},
    "server": {"fedlm", "server"},
    "simulations": {"fedlm", "clients", "server", "simulations"},
}
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=["ruff-check", "ruff-format", "mypy-strict"],
)
def test_checkers_find_nothing(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def imported(source: Path) -> set[str]:
    """Top-level packages that a file imports, lazily or not, outside type checking alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_down_only(source: Path) -> None:
    package, *rest = source.relative_to(ROOT).parts
    if package == "fedlm" and rest[0] == "cli":
        return
    upward = (imported(source) & set(PACKAGES)) - MAY_IMPORT[package]
    assert not upward, f"{package} must not import {upward}"
    if package == "fedlm" and rest != ["flower_records.py"]:
        assert not imported(source) & {"flwr", "ray"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are(source: Path) -> None:
    text = source.read_text()
    assert text.count("\n") <= 500
    assert ast.get_docstring(ast.parse(text)), "a module without a docstring"


def test_importing_fedlm_imports_neither_flwr_nor_ray_nor_torch() -> None:
    program = "import sys, fedlm; print([m for m in ('flwr', 'ray', 'torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
