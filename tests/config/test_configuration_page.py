"""docs/configuration.md has every key that a config can hold, as the schema has it, and each says what it means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedlm.cli import main
from fedlm.config.keys import keys, keys_of_options
from fedlm.registry import REGISTRIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
ROW = re.compile(r"^\| `([\w.]+)` \| `(.*?)` \| (.*?) \| (.*) \|$", re.MULTILINE)
# typer below 0.21, which Flower asks for, imports names that click 8.5 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")


def test_the_page_is_what_the_verb_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--markdown"]) == 0
    made = "; make it again: fedlm config show --markdown > docs/configuration.md"
    assert capsys.readouterr().out == PAGE.read_text(encoding="utf-8"), f"{PAGE.name} is out of date{made}"


def test_every_key_and_every_option_has_a_row_with_its_default_its_range_and_a_meaning() -> None:
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    named = [path for path, *_ in rows]
    assert named[: len(keys())] == sorted(keys(), key=lambda path: ("." in path, list(keys()).index(path)))
    options = [
        field
        for registry in REGISTRIES
        for name in registry.built_in
        for field in keys_of_options(registry.options_of(name), "")
    ]
    assert [path.rpartition(".")[2] for path in named[len(keys()) :]] == options
    assert [path for path, _, allowed, meaning in rows if not allowed.strip() or len(meaning.split()) < 1] == []
    by_path = {path: (default, allowed) for path, default, allowed, _ in rows}
    assert by_path["privacy.delta"] == ("1e-06", "a number > 0 and <= 0.1")
