"""The run folder of `fedlm finetune`.

    config.toml           the resolved experiment
    plan.json             the guarantee as planned, written before the first step
    metrics.jsonl         a line now and then; fields named non_private_* and seconds are not covered by the guarantee
    summary.json          the figures of the finished run
    weights/
        README.md, privacy.json   the guarantee, for people and for programs; in adapter/ too
        adapter/          LoRA: a peft adapter folder
        trained.safetensors   every other trained tensor, by its name in the stock model

Whole files appear at once or not at all; metrics grow by whole lines.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedlm.data.cache import publish_folder
from fedlm.errors import OutputError

WEIGHTS = "weights"


class FinetuneFolder:
    """Writes one run folder.

    Arguments:
        path: The folder; made if missing, and its owner's alone (0700).

    Raises:
        OutputError: It exists and is not an empty folder, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        require_free(path)
        with _explained(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)  # it may have been there, empty

    def text(self, name: str, text: str) -> None:
        """Write a file."""
        file = self.path / name
        temporary = file.with_name(f".{name}.{os.getpid()}.tmp")
        with _explained(self.path):
            try:
                with temporary.open("w", encoding="utf-8") as stream:
                    stream.write(text)
                    stream.flush()
                    os.fsync(stream.fileno())
                temporary.replace(file)
            finally:
                temporary.unlink(missing_ok=True)

    def json(self, name: str, values: Mapping[str, object]) -> None:
        """Write an object; NaN and infinities are null."""
        self.text(name, json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")

    def metric(self, line: Mapping[str, object]) -> None:
        """Append a line to metrics.jsonl."""
        with _explained(self.path), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(_finite(line), allow_nan=False) + "\n")

    @contextmanager
    def weights(self) -> Iterator[Path]:
        """Give a folder to write the weights into; it gets its name once all are written."""
        with _explained(self.path), publish_folder(self.path / WEIGHTS) as building:
            yield building


def require_free(path: Path) -> None:
    """Refuse, before any work starts, a path at which something lies.

    Raises:
        OutputError: It exists and is not an empty folder.
    """
    with _explained(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"{path} exists and is not an empty folder; choose another --out")


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line that says what to do."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write the run folder {path}: {error.strerror or error}; free space, or choose another --out"
        ) from error
