"""The tree is formatted, linted and typed; layers import downward only; every file keeps its size."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fedlm", "clients", "server", "simulations")
# Which packages a package may import (docs/how_it_works.md). The doors alone, the command line and its functions for
# Python, may import all, and only when one of their functions runs: `import fedlm` stays light, and nothing else
# below sees what is above it.
DOORS = ("cli", "api.py")
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
    return packages_of(ast.walk(ast.parse(source.read_text())))


def imported_at_once(source: Path) -> set[str]:
    """Top-level packages that importing a file imports, but for those of type checking and of blocks."""
    return packages_of(ast.parse(source.read_text()).body)


def packages_of(nodes: Iterable[ast.AST]) -> set[str]:
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_down_only(source: Path) -> None:
    package, *rest = source.relative_to(ROOT).parts
    if package == "fedlm" and rest[0] in DOORS:
        assert not imported_at_once(source) & (set(PACKAGES) - {"fedlm"}), "import it inside the function that needs it"
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


def is_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text: of a file, or of a child process with `text=True`."""
    if any(keyword.arg == "text" and ast.unparse(keyword.value) == "True" for keyword in call.keywords):
        return True
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if name not in {"open", "fdopen"} or (owner, name) == ("os", "open"):
        return name in {"read_text", "write_text"}
    values = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    modes = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    is_another_open = owner and owner not in {"os", "io", "lzma"} and values and not modes  # such as a folder's
    return not is_another_open and not any("b" in mode for mode in modes)


def test_no_text_is_in_the_encoding_of_the_locale() -> None:
    """Ruff's PLW1514 sees only paths whose type it can guess."""
    found = [
        f"{source.relative_to(ROOT)}:{call.lineno}"
        for source in SOURCES
        for call in ast.walk(ast.parse(source.read_text()))
        if isinstance(call, ast.Call) and is_text(call) and "encoding" not in {k.arg for k in call.keywords}
    ]
    assert not found, f"say encoding='utf-8': {found}"


def test_importing_fedlm_imports_neither_flwr_nor_ray_nor_torch() -> None:
    program = "import sys, fedlm; print([m for m in ('flwr', 'ray', 'torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
