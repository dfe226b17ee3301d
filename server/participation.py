"""Who of a round's cohort takes part: the seam between the round loop and a simulated fleet.

The cohort is sampled first, over the whole fleet. Who of it then stays away, drops out or is late counts as a zero
vector: nobody is sampled in its place, the divisor stays the plan's expected cohort, and the accounted probability
stays the sampler's.

Guarantee:
    Turning devices away costs no privacy as long as a fleet decides on a device by public figures and by that
    device's own data size, and by nothing of another device. Then leaving one device out changes no other device's
    part in any round. A fleet must therefore be a pure function of seed, round and device; a virtual clock that waits
    for the slowest device, or a round that takes the first k replies, would break this.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedlm.trainable.spec import RowIds, UpdateSpec

TRAINS, NO_MEMORY, UNAVAILABLE, DROPPED_OUT, TOO_LATE, SPENT = range(6)
OUTCOMES = ("trains", "not enough memory", "unavailable", "dropped out", "too late", "own budget spent")
"""What a ledger calls each outcome. The first downloads and uploads, `dropped out` and `too late` download alone."""

Outcomes = npt.NDArray[np.uint8]
Bytes = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RoundTask:
    """What a round asks of its devices.

    Arguments:
        round_number: t, from 1.
        cohort: (U,) sampled devices, ascending.
        spec: The round's update.
        bytes_down: (U,) what each device would download.
        num_answers: Coordinates beside the update (`fedlm.privacy.clipping.side_queries`).
        encoded_bytes: What a device sends where it encodes update and answers (`fedlm.privacy.noise.skellam_encoding`);
            else 0.
    """

    round_number: int
    cohort: RowIds
    spec: UpdateSpec
    bytes_down: Bytes
    num_answers: int = 0
    encoded_bytes: int = 0

    @property
    def bytes_up(self) -> int:
        """What a device uploads."""
        return self.encoded_bytes or self.spec.num_bytes + 4 * self.num_answers


@dataclass(frozen=True)
class VirtualTime:
    """A round on the fleet's own clock: seconds from the first round's start to its own, and how long it took."""

    start_s: float
    round_s: float

    @property
    def end_s(self) -> float:
        """When the round's last reply was in."""
        return self.start_s + self.round_s


@dataclass(frozen=True, eq=False)
class RoundParticipation:
    """What became of each device of a cohort.

    Arguments:
        task: What was asked.
        outcomes: (U,) index into OUTCOMES.
        seconds: (U,) virtual seconds that each device spent on the round; zero for those that stayed away.
        time: The round on the virtual clock; None without one.
    """

    task: RoundTask
    outcomes: Outcomes
    seconds: Seconds
    time: VirtualTime | None = None

    @property
    def training(self) -> RowIds:
        """Devices whose update arrives: the only ones that nodes train."""
        return np.compress(self.outcomes == TRAINS, self.task.cohort)

    @property
    def visited(self) -> npt.NDArray[np.bool_]:
        """(U,) which devices downloaded."""
        return np.isin(self.outcomes, (TRAINS, DROPPED_OUT, TOO_LATE))

    @property
    def bytes_down(self) -> Bytes:
        """(U,) bytes that each device downloaded."""
        return np.where(self.visited, self.task.bytes_down, 0)

    @property
    def bytes_up(self) -> Bytes:
        """(U,) bytes that each device uploaded."""
        return np.where(self.outcomes == TRAINS, self.task.bytes_up, 0)

    def without(self, spent: npt.NDArray[np.bool_]) -> RoundParticipation:
        """Return the same round in which these devices (U,) of the cohort stay away, their own budget being spent."""
        return replace(
            self, outcomes=np.where(spent, np.uint8(SPENT), self.outcomes), seconds=np.where(spent, 0.0, self.seconds)
        )

    def absent(self) -> dict[str, int]:
        """Return how many devices did not report, by cause; causes without a device are left out."""
        counts = np.bincount(self.outcomes, minlength=len(OUTCOMES)).tolist()
        return {OUTCOMES[i]: counts[i] for i in range(TRAINS + 1, len(OUTCOMES)) if counts[i]}

    def warning(self) -> str:
        """Return what to tell the user when the whole cohort stayed away; empty otherwise."""
        absent = self.absent()
        if len(self.training) or not absent:
            return ""
        causes = ", ".join(f"{count} {cause}" for cause, count in absent.items())
        return f"round {self.task.round_number}: nobody takes part, noise alone is released: {causes}"

    def complete(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return the round's ledger line, which speaks of the devices in training alone, for the whole cohort."""
        completed = {
            **line,
            "sampled": len(self.task.cohort),
            "failed": dict(Counter(line["failed"]) + Counter(self.absent())),
            "downloaded": int(self.visited.sum()),
            "uploaded": len(self.training),
        }
        return completed | ({"virtual": self._virtual(self.time)} if self.time else {})

    def _virtual(self, time: VirtualTime) -> dict[str, float | None]:
        seconds = self.seconds[self.visited]
        median, p90, most = np.quantile(seconds, (0.5, 0.9, 1.0)).tolist() if len(seconds) else (None, None, None)
        return {
            "start_s": time.start_s,
            "round_s": time.round_s,
            "device_s_median": median,
            "device_s_p90": p90,
            "device_s_max": most,
        }


class Fleet(Protocol):
    """Decides on a cohort's devices; see the guarantee above for what it may look at."""

    def describe(self) -> dict[str, Any]:
        """Return what the ledger's start says of the fleet; equal fleets return equal values."""

    def participation(self, task: RoundTask) -> RoundParticipation:
        """Return what becomes of each device; the same for the same task, in any order and any process."""


class EveryDevice:
    """A fleet whose devices all take part, at once: real nodes, and simulations without profiles."""

    def describe(self) -> dict[str, Any]:
        """Return the profile's name."""
        return {"profile": "uniform"}

    def participation(self, task: RoundTask) -> RoundParticipation:
        """Return that every device trains."""
        num_devices = len(task.cohort)
        return RoundParticipation(task, np.full(num_devices, TRAINS, np.uint8), np.zeros(num_devices))
