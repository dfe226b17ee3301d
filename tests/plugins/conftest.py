"""A folder with the tiny job in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_job import CONFIG, Job

from fedlm import plugins, registry
from fedlm.environment import QUIET_ENVIRONMENT


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests: the base is trained once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def job(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """The job, in a folder that is on no search path; what its plug-in leaves in this process goes with it."""
    for name in QUIET_ENVIRONMENT:  # so that what main sets is undone
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "job.toml").write_text(CONFIG.format(cache=cache))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_folders", [])
    yield Job(folder, monkeypatch)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
    registry._resolved.cache_clear()
