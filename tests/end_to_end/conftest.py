"""One tiny experiment on real chat data, and two ways to run `fedlm` on it: in a process of its own, or in this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
from pathlib import Path

import pytest
from tiny_fedlm import TINY, Done, Fedlm, command, environment

from fedlm.cli import main
from fedlm.environment import QUIET_ENVIRONMENT


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file; all tests share its cache, so the corpus is parsed and the base trained once."""
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "tiny.toml"
    path.write_text(TINY.format(cache=folder / "cache"))
    return path


@pytest.fixture
def fedlm(tmp_path: Path) -> Fedlm:
    """Run `fedlm` in a process of its own, from an empty folder."""

    def run(*words: object, **extra: str) -> Done:
        ended = subprocess.run(
            command(*words), capture_output=True, text=True, cwd=tmp_path, env=environment(**extra), timeout=300
        )
        return Done(ended.returncode, ended.stdout, ended.stderr, tmp_path / "run")

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> Fedlm:
    """Run `fedlm simulate` on the tiny experiment in this process, which saves the seconds of importing torch."""
    for name in QUIET_ENVIRONMENT:  # so that what main sets is undone
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str, config: Path = tiny) -> Done:
        words = ["simulate", str(config), "--json", "--quiet", "--out", "run"]
        words += [word for override in overrides for word in ("--set", override)]
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            code = main(words)
        return Done(code, out.getvalue(), error.getvalue(), tmp_path / "run")

    return run
