"""The cache folder: what is expensive to derive lies there under a hash of everything that determines it."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlm.config.schema import Config
from fedlm.errors import DataError, OutputError


def cache_folder(config: Config) -> Path:
    """Return `data.cache_dir`, or the user cache folder of this system; it need not exist yet."""
    if config.data.cache_dir:
        return Path(config.data.cache_dir).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("fedlm"))


def content_key(parts: Mapping[str, Any]) -> str:
    """Return 32 hex digits that name a content; `parts` is JSON of everything that determines it."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """Return the hash of a file's bytes as 32 hex digits.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


@contextmanager
def publish_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; on success rename it to `folder` in one step.

    Two processes may build the same content: the first rename wins and the other's work is dropped. On an
    error the temporary folder is removed and `folder` is not touched.

    Raises:
        OutputError: The parent folder cannot be written, or the disk is full.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        raise OutputError(f"cannot write the cache {folder.parent}: {error.strerror}; set data.cache_dir") from None
    try:
        yield temporary
        _rename_unless_there(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OutputError(f"cannot write {folder}: {error.strerror}; free space or set data.cache_dir") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_unless_there(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
