"""noise_keys: the keys of correlated noise, one line a round, for the operator's eyes alone.

Correlated noise subtracts in later rounds what it added in earlier ones; a resumed run therefore needs the earlier
draws again, and each follows from a 128-bit key. A round's key is on disk before its release is begun. If the run dies
before the release is whole, `rewind` throws the key away, and the round, whose sum may come out otherwise the second
time, draws another; a whole release is adopted with its key (`server.journal`). Whoever has this file can subtract the
noise of the releases: it is readable by its owner only, and gone when the run has ended.
"""

from __future__ import annotations

import os
from pathlib import Path

from fedlm.errors import DataError, OutputError
from server.run_folder import sync_folder

NAME = "noise_keys"


class NoiseKeys:
    """The file as a `fedlm.privacy.run_noise.KeyStore`.

    Arguments:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._next = folder / NAME, folder / f".{NAME}.tmp"

    def keys(self) -> list[int]:
        """Return the keys of rounds 1, 2, 3, ...; a torn last line belongs to a round that was not released.

        Raises:
            DataError: The lines are not those of consecutive rounds.
        """
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        lines = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if [line[0] for line in lines] != [str(t) for t in range(1, len(lines) + 1)]:
            raise DataError(f"{self._path} does not have the rounds 1, 2, 3, ...; restore it, or start a new run")
        return [int(key, 16) for _, key in lines]

    def append(self, round_number: int, key: int) -> None:
        """Make a round's key durable."""
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(f"{round_number} {key:032x}\n")
                stream.flush()
                os.fsync(stream.fileno())
            sync_folder(self._path.parent)
        except OSError as error:
            fix = "free some space or make it writable, then `fedlm resume` this run"
            raise OutputError(f"{self._path} cannot be written: {error.strerror or error}; {fix}") from error

    def rewind(self, last_round: int) -> None:
        """Throw away the keys of rounds after `last_round`, which were never released.

        Raises:
            DataError: Keys of released rounds are missing.
        """
        keys = self.keys()
        if len(keys) < last_round:
            raise DataError(
                f"{self._path} has the noise keys of {len(keys)} rounds, {last_round} were released; restore it: "
                "going on without them would add noise that nothing takes back"
            )
        text = "".join(f"{t} {key:032x}\n" for t, key in enumerate(keys[:last_round], 1))
        handle = os.open(self._next, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        self._next.replace(self._path)
        sync_folder(self._path.parent)

    def forget(self) -> None:
        """Delete the file, and what a crash in `rewind` may have left: nothing will be released any more."""
        for file in (self._path, self._next):
            file.unlink(missing_ok=True)
