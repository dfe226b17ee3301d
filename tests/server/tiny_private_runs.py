"""Tiny real runs of the privacy tests: their settings, how to stop them, what they left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

TINY = (
    "execution.grid=inprocess", "data.max_tokens_per_user=40", "fleet.cohort=12", "rounds=5", "execution.eval_every=0",
    "execution.checkpoint_every=3", "model.d_model=16", "trainable.embedding_rows.count=40",
)  # fmt: skip


class StoppedError(Exception):
    """Raised by a listener in mid-round."""


def quiet(event: dict[str, object]) -> None:
    """Ignore progress."""


def stop_in(round_number: int) -> Callable[[dict[str, object]], None]:
    """Return a listener that ends a run in the middle of a round."""

    def listener(event: dict[str, object]) -> None:
        if event["event"] == "device_done" and event["round"] == round_number:
            raise StoppedError

    return listener


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl or ledger.jsonl."""
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def final(run: Path) -> dict[str, Any]:
    """Return the arrays of the last checkpoint."""
    return load_file(run / "checkpoints" / "round_000005.safetensors")
