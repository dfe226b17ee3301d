"""The journal's files: what a release looks like on disk, and what becomes of one whose writer was killed.

A release is written under a temporary name, synced, and renamed; until then nothing was sent, computed or told from it.
A kill in between leaves the temporary file, which anybody who sees the folder can read. Releasing the round again with
fresh noise beside it would give that reader two noised copies of one sum: the noise multiplier falls by the root of
two. So whoever takes the folder's lock *settles* the journal before any round is released:

* A *whole* file (its digest says so) is adopted: synced and renamed. The round is then released, as if the kill had
  come a moment later, and is replayed from the journal like every other. Nothing is drawn, so nothing can differ. Under
  correlated noise the last key on disk is the one that this release was made with: a key is synced before its release
  is begun, and keys of unreleased rounds are thrown away only after the journal is settled.
* Anything else is destroyed, and the folder synced, so that neither a crash nor a loss of power brings it back beside
  its successor. Its key, if it had one, goes with it, and the next attempt draws another: the sum may come out
  otherwise, and no draw may be used on two sums. The folder is synced even where nothing was found, because the writer
  itself may have removed its file a moment before the power went.

So there is at every moment at most one file of a round, whole or not. What no program can take back is a copy that
somebody made of a torn file between the kill and the next start; a whole one, which says most, is the release itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

_RECORD, _DIGEST = "record", "digest"


def release_file(journal: Path, round_number: int) -> Path:
    """Return the file of a round's release."""
    return journal / f"round_{round_number:06d}.safetensors"


def encode_release(arrays: Mapping[str, Any], record: Mapping[str, Any]) -> bytes:
    """Return the content of a release's file.

    Arguments:
        arrays: What was released, by name.
        record: What metrics and ledger will say of the round.
    """
    text = json.dumps(record, allow_nan=False)
    return save(dict(arrays), metadata={_RECORD: text, _DIGEST: _digest(arrays, text)})


def read_record(file: Path) -> dict[str, Any]:
    """Return the record that `encode_release` stored with a release."""
    record: dict[str, Any] = json.loads(_metadata(file)[_RECORD])
    return record


def settle(journal: Path, *, last_checkpoint: int) -> None:
    """Adopt or destroy what killed processes left of releases; the caller holds the folder's lock.

    Arguments:
        journal: The folder of the releases.
        last_checkpoint: The newest whole state's round; -1 before the first. Its release, if left over, is destroyed.
    """
    for temporary in sorted(journal.glob(".round_*.safetensors.*.tmp")):
        file = journal / f"{temporary.name[1:].partition('.')[0]}.safetensors"
        is_next = int(file.stem.removeprefix("round_")) > last_checkpoint
        if is_next and not file.exists() and _is_whole(temporary):
            _sync(temporary)
            temporary.replace(file)
        else:
            temporary.unlink()
    _sync(journal)


def _is_whole(file: Path) -> bool:
    """Tell whether a file has all that `encode_release` made; after a loss of power even its length may deceive."""
    try:
        metadata = _metadata(file)
        return _digest(load_file(file), metadata[_RECORD]) == metadata[_DIGEST]
    except (OSError, ValueError, KeyError, SafetensorError):
        return False


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "np") as handle:
        return dict(handle.metadata() or {})


def _digest(arrays: Mapping[str, Any], record: str) -> str:
    digest = blake2b(record.encode(), digest_size=16)
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"\0{name} {array.dtype.str} {array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
