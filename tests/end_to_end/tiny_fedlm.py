"""The tiny experiment of these tests, and how its commands are started and judged."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY = """
rounds = 2
[data]
cache_dir = "{cache}"
sequence_length = 16
max_tokens_per_user = 120
max_eval_tokens = 1000
[vocabulary]
size = 2000
[model]
d_model = 32
num_layers = 1
num_heads = 2
[pretrain]
epochs = 1
negatives = 200
[trainable]
lora = {{ rank = 4 }}
embedding_rows = {{ count = 300 }}
[loss]
negatives = 64
[local]
learning_rate = 0.1
row_learning_rate = 0.1
[fleet]
cohort = 12
[execution]
grid = "inprocess"
group_size = 4
"""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    error: str
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        """The one object on standard output."""
        assert self.code == 0, self.error
        assert self.out.count("\n") == 1
        parsed: dict[str, Any] = json.loads(self.out)
        return parsed

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of a .jsonl file of the run."""
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


Fedlm = Callable[..., Done]


def command(*words: object) -> list[str]:
    """Return the words of a process that runs `fedlm`."""
    return [sys.executable, "-m", "fedlm.cli", *map(str, words)]


def environment(**extra: str) -> dict[str, str]:
    """Return this process's environment with one thread for torch and what is given on top."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **extra}


def one_line(done: Done, code: int, *parts: str) -> None:
    """Check that a command failed as promised: nothing on stdout, one line on stderr that says `parts`."""
    assert done.code == code, done.error
    assert done.out == ""
    *warnings, error = done.error.splitlines()
    assert all(line.startswith("warning: ") for line in warnings), done.error
    assert error.startswith("fedlm: error: ")
    for part in parts:
        assert part in error
