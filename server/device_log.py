"""devices.csv: what became of every sampled device in every round, on request.

A round's lines are on disk before its release is, so every released round has all of its lines; a resumed run drops
those of rounds that were never released. The file tells who took part, as the key of the cohorts does: it belongs to
the operator alone, who alone may read it, and it stays when the run has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlm.errors import OutputError
from server.participation import OUTCOMES, RoundParticipation
from server.run_folder import owners_alone

NAME = "devices.csv"
_HEADER = "round,device,outcome,seconds,bytes_down,bytes_up\n"


class DeviceLog:
    """Writes devices.csv.

    Arguments:
        folder: The run folder.
        enabled: False: no file, and all methods do nothing.
    """

    def __init__(self, folder: Path, *, enabled: bool) -> None:
        self._path, self._enabled = folder / NAME, enabled

    def append(self, participation: RoundParticipation) -> None:
        """Append a line for each device of a round's cohort."""
        if not self._enabled:
            return
        t = participation.task.round_number
        columns = (
            participation.task.cohort,
            participation.outcomes,
            participation.seconds,
            participation.bytes_down,
            participation.bytes_up,
        )
        rows = zip(*(column.tolist() for column in columns), strict=True)
        lines = [f"{t},{device},{OUTCOMES[what]},{s:.3f},{down},{up}\n" for device, what, s, down, up in rows]
        with self._explained(), open(self._path, "a", encoding="utf-8", opener=owners_alone) as stream:
            stream.write(("" if stream.tell() else _HEADER) + "".join(lines))

    def rewind(self, last_round: int) -> None:
        """Cut the file after the lines of `last_round`; a torn last line is of a round that was not released."""
        if not self._enabled or not self._path.exists():
            return
        with self._explained(), self._path.open("r+b") as stream:
            header = stream.readline()
            kept = len(header) if header.endswith(b"\n") else 0
            for line in stream:
                if not line.endswith(b"\n") or int(line.partition(b",")[0]) > last_round:
                    break
                kept += len(line)
            stream.truncate(kept)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            fix = "free some space or make it writable, then `fedlm resume` this run"
            raise OutputError(f"{self._path} cannot be written: {error.strerror or error}; {fix}") from error
