"""What the pages name is there: files, modules, links; and every room of the house has a row."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

from fedlm.registry import REGISTRIES

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fedlm", "clients", "server", "simulations")
FOLDERS = (*PACKAGES, "tests", "docs", "examples", "benchmarks")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])
CODE = re.compile(r"`([^`\n]+)`")
DOTTED = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+")
GROUPS = {registry.group for registry in REGISTRIES}  # named like modules, of packages of other people


def is_there(path: str) -> bool:
    return any(ROOT.glob(path.rstrip("/"))) if "*" in path else (ROOT / path).exists()


def paths_of(page: Path) -> list[str]:
    """Return the words in backticks that begin with a folder of this tree, without a test's name or a line's end."""
    words = [word.rstrip(",.;)").partition("::")[0] for code in CODE.findall(page.read_text()) for word in code.split()]
    return [word for word in words if word.startswith(tuple(f"{folder}/" for folder in FOLDERS))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    assert [path for path in paths_of(page) if not is_there(path)] == []
    files = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    bare = [word for word in CODE.findall(page.read_text()) if re.fullmatch(r"\w+\.py", word)]
    assert [word for word in bare if word not in files | {"server.py", "momentum.py"}] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_and_names_that_a_page_gives_exist(page: Path) -> None:
    missing = []
    for code in CODE.findall(page.read_text()):
        if DOTTED.fullmatch(code) and code not in GROUPS and not code.endswith(".py"):
            try:
                resolve_name(code)
            except (ImportError, AttributeError) as error:
                missing.append(f"{code}: {error}")
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def rooms() -> set[str]:
    """Return every package of the tree, and every module beside the packages."""
    found = {f"{path.parent.relative_to(ROOT)}/" for name in PACKAGES for path in (ROOT / name).rglob("__init__.py")}
    modules = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).glob("*.py")}
    return (found - {f"{name}/" for name in PACKAGES}) | modules


def test_every_room_has_one_row_and_one_sentence() -> None:
    page = (ROOT / "docs" / "how_it_works.md").read_text()
    table = page[page.index("## Every room") :]
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", table, re.MULTILINE)
    assert sorted(path for path, _ in rows) == sorted(rooms())
    assert all(len(sentence.split()) > 1 for _, sentence in rows)
    modules = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    assert all(any(str(path.relative_to(ROOT)).startswith(room) for room, _ in rows) for path in modules)


def test_contributing_answers_for_what_people_add() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| ([^|`]+) \| (.+) \| (.+) \|$", page, re.MULTILINE)
    answers = {what: (plug_in, built_in) for what, plug_in, built_in in rows if not what.startswith("I add")}
    assert len(answers) >= 12
    assert [what for what, (_, built_in) in answers.items() if not CODE.search(built_in)] == []
    # Every registry is a seam that somebody may want to add to.
    assert [registry.key for registry in REGISTRIES if f"`{registry.key}`" not in page] == []
