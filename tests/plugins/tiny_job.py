"""A tiny job on synthetic text, in a folder that has one plug-in file beside the config."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedlm import registry
from fedlm.cli import main

CONFIG = """
rounds = 2
[data]
corpus = "synthetic"
cache_dir = "{cache}"
sequence_length = 16
max_eval_tokens = 300
[synthetic]
users = 60
tokens_per_user = 30
classes = 16
[vocabulary]
size = 300
[model]
d_model = 16
num_layers = 1
num_heads = 2
[pretrain]
epochs = 1
negatives = 50
[trainable]
lora = {{ rank = 2 }}
embedding_rows = {{ count = 40 }}
[loss]
negatives = 16
[fleet]
cohort = 8
[privacy]
delta = 1e-3
reproducible_noise = true
reproducible_cohorts = true
[execution]
grid = "inprocess"
group_size = 4
"""


@dataclass(frozen=True)
class Job:
    """A folder with the config and, once written, one plug-in file; the tests' own folder is another one."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def write(self, name: str, source: str) -> None:
        """Write the plug-in: everything that is added from outside."""
        (self.folder / f"{name}.py").write_text(textwrap.dedent(source))

    def fedlm(self, verb: str, *overrides: str, quiet: bool = True) -> tuple[int, Any, str]:
        """Run a verb on the config with the real command line; return exit code, parsed output, standard error."""
        words = [*verb.split(), str(self.folder / "job.toml"), "--json"]
        words += [*(["--quiet"] if quiet else []), "--out", str(self.run)] if verb == "simulate" else []
        words += [word for override in overrides for word in ("--set", override)]
        return _run(words)

    def verb(self, *words: str) -> Any:
        """Run a verb that takes no config and return its one object."""
        code, found, error = _run([*words, "--json"])
        assert code == 0, error
        return found

    def verb_error(self, *words: str) -> str:
        """Return the line with which such a verb refuses its words."""
        code, _, error = _run([*words, "--json"])
        assert code == 2
        return error

    def simulate(self, *overrides: str) -> dict[str, Any]:
        """Train and return the summary."""
        code, summary, error = self.fedlm("simulate", *overrides)
        assert code == 0, error
        found: dict[str, Any] = summary
        return found

    def refusal(self, *overrides: str) -> str:
        """Return the one line with which a config is refused."""
        code, _, error = self.fedlm("config check", *overrides)
        assert code == 2
        assert error.count("\n") == 1
        return error

    def shown(self, key: str, *overrides: str) -> dict[str, Any]:
        """Return what `fedlm config show` says of a key."""
        code, found, error = self.fedlm("config show", *overrides)
        assert code == 0, error
        return next(row for row in found["keys"] if row["key"] == key)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the objects of a .jsonl file of the run."""
        return [json.loads(line) for line in (self.run / name).read_text().splitlines()]

    def forget(self, name: str) -> None:
        """Let this process forget a plug-in, as a new process would not know it."""
        del sys.modules[name]
        importlib.invalidate_caches()
        registry._resolved.cache_clear()

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"


def _run(words: list[str]) -> tuple[int, Any, str]:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main(words)
    return code, json.loads(out.getvalue()) if code == 0 else out.getvalue(), error.getvalue()
