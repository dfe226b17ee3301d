"""What the test kit examines: a black box that answers rounds, and what it claims about them.

The kit sees what an analyst sees (`Outcome`) and chooses what devices compute (`updates`), the worst case that the
guarantee is about. To examine something other than a fedlm strategy, write `Subject` for it and call `check_subject`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedlm.trainable.spec import RowIds, Vector

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """The experiment that a subject is made for.

    Arguments:
        size: Coordinates P of an update; a multiple of 8.
        fleet_size: Devices N, with ids 0..N-1.
        cohort: Expected devices a round, n.
        clip_norm: C of the first round.
        noise_multiplier: z.
        rounds: T.
        seed: Decides the cohorts, and the noise when it is reproducible.
        reproducible: The same seed, round and earlier releases give the same noise: what record and replay needs.
    """

    size: int
    fleet_size: int
    cohort: int
    clip_norm: float
    noise_multiplier: float
    rounds: int
    seed: int
    reproducible: bool


@dataclass(frozen=True)
class ClaimedGuarantee:
    """What a subject says that it does.

    Arguments:
        noise_multiplier: z: one device changes a round's release, in units of `Outcome.std`, by at most 1/z in L2 norm.
        cohort: n, the public divisor of the release.
        sampling_probability: q of each device, independently, in each round in which it can be sampled: every one, or
            with a separation b those of its class, the rounds t with one remainder of t / b. None: no such law.
        matrix: (T, T) C of correlated noise, lower triangular: C @ noise is iid over the rounds; None for independent
            noise.
        separation: b: a device is in at most one of any b consecutive rounds.
        max_participations: Most rounds of one device; 0: no limit.
        largest_cohort: Cap on a round's devices, with q the coins before it; 0: none.
        by_report: Every report brings its own noise, whose size no report may exceed by its influence: `Outcome.std`
            grows with the root of the number of reports, which is public, and neighbours send zero instead of nothing.
    """

    noise_multiplier: float
    cohort: int
    sampling_probability: float | None = None
    matrix: Floats | None = None
    separation: int = 1
    max_participations: int = 0
    largest_cohort: int = 0
    by_report: bool = False


@dataclass(frozen=True)
class Outcome:
    """Everything that leaves a round.

    Arguments:
        release: (P',) the noised vector. Its first P coordinates are the mean update, sum / n; side queries may follow.
        std: Claimed standard deviation of Z in each coordinate, in units of `release`: a number or (P',).
        state: All else that is published or kept for later rounds, by name: model, optimiser arrays, the next clip
            norm, row sets, diagnostics. It has to follow from releases alone.
    """

    release: npt.NDArray[np.floating[Any]]
    std: float | Floats
    state: Mapping[str, npt.NDArray[Any]]


class Subject(Protocol):
    """One run under examination. Rounds come in the order 1, 2, 3, ..., each by `round` or by `replay`."""

    @property
    def claim(self) -> ClaimedGuarantee:
        """What the run says about itself."""
        ...

    def sample_cohort(self, round_number: int) -> RowIds:
        """Return the sorted ids of the devices of a round; any round may be asked for, in any order."""
        ...

    def round(self, round_number: int, updates: Mapping[int, Vector]) -> Outcome:
        """Run a round; `updates` has (P,) for the devices of the cohort that report, the others drop out."""
        ...

    def replay(self, round_number: int, updates: Mapping[int, Vector], release: Floats) -> Outcome:
        """Run a round whose release is already public: draw no new noise, and go on with `release`."""
        ...

    def restarted(self) -> Subject:
        """Return the run as a new process would continue it from what is on disk now."""
        ...


Make = Callable[[Setting], Subject]
"""Makes a new run; two calls with equal settings stand for two processes."""
