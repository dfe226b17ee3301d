"""The fleet that a simulation gives the round loop: who of a cohort takes part, and the devices' own clock.

In this order a device stays away because its memory does not hold the training (estimated from its own data size), or
because it is not available at the virtual hour; it downloads, and then may drop out, or be too late for the deadline.
A device knows the deadline and starts no upload that would end after it.

Rounds start at fixed virtual times, `round_interval_s` apart, and never wait for the slowest device: a clock that did
would let one device's data size decide at which hour, and so with whom, the next round runs (`server.participation`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlm.experiment import Experiment
from fedlm.randomness import seed_key, stream
from fedlm.trainable.build import Trainable
from server.participation import (
    DROPPED_OUT,
    NO_MEMORY,
    TOO_LATE,
    TRAINS,
    UNAVAILABLE,
    EveryDevice,
    Fleet,
    RoundParticipation,
    RoundTask,
    VirtualTime,
)
from simulations.fleet.costs import CostTable, DeviceCost, Figures
from simulations.fleet.devices import Devices
from simulations.fleet.profile import Profile, load_profile

_BITS_PER_MEGABIT = 1e6


def fleet_maker(profile_name: str) -> Callable[[Experiment, Trainable], Fleet]:
    """Read a profile now, so that a mistake in it comes before any work; returns what makes the fleet later.

    Raises:
        DataError: As `load_profile`.
    """
    return partial(_make_fleet, load_profile(profile_name))


def _make_fleet(profile: Profile, experiment: Experiment, trainable: Trainable) -> Fleet:
    config = experiment.config
    if config.fleet.is_unconstrained:
        return EveryDevice()
    from fedlm.planning.device_cost import CostModel
    from fedlm.planning.forecast import schedule_of

    # No later round's row set is larger than the first, and with one cost, the round's that trains most, a device is
    # eligible always or never.
    trained = schedule_of(config, trainable.spec, experiment.vocabulary.frequencies).most_trained
    return VirtualFleet(experiment, profile, CostModel(config, trained, trainable.model))


class VirtualFleet:
    """Devices of a profile; fulfils `server.participation.Fleet`.

    Arguments:
        experiment: Config, data sizes and which device holds which user.
        profile: What the devices can do.
        cost: What training costs them.
    """

    def __init__(self, experiment: Experiment, profile: Profile, cost: DeviceCost) -> None:
        self._experiment, self._config = experiment, experiment.config.fleet
        self._key = seed_key(experiment.config.seed)
        self._devices = Devices.draw(profile, len(experiment.fleet), experiment.config.seed)
        self._cost = CostTable(cost, int(experiment.store.num_tokens.max()))

    def describe(self) -> dict[str, Any]:
        """Return the profile and how many devices each class has."""
        profile = self._devices.profile
        counts = np.bincount(self._devices.row, minlength=profile.num_rows).tolist() if profile.classes else []
        classes = dict.fromkeys(profile.classes, 0)
        for name, count in zip(profile.classes, counts, strict=True):  # two rows may share a name
            classes[name] += count
        return {"profile": profile.name, "profile_digest": profile.digest, "classes": classes}

    def participation(self, task: RoundTask) -> RoundParticipation:
        """Return what becomes of each device of a cohort; see `server.participation` for what that may depend on."""
        cohort, devices, t = task.cohort, self._devices, task.round_number
        num_tokens = self._experiment.store.num_tokens[self._experiment.fleet[cohort]]  # (U,)
        start_s = (t - 1) * self._config.round_interval_s
        utc_hour = self._config.start_hour + start_s / 3600
        available = devices.available(cohort, utc_hour)
        stays = self._cost.peak_mb(num_tokens) > np.minimum(devices.memory_mb(cohort), self._cap_mb)
        absent = self._coins("fleet/available", int(utc_hour), task) >= available
        leaves = self._coins("fleet/dropout", t, task) < devices.dropout(cohort)

        worked_s = _transfer_s(task.bytes_down, devices.down_mbit(cohort))  # (U,)
        worked_s += self._cost.gigaflops(num_tokens) / devices.gflops(cohort)
        all_s = worked_s + _transfer_s(task.bytes_up, devices.up_mbit(cohort))
        late = all_s > self._deadline_s
        outcomes = np.select(
            [stays, absent, leaves, late], [NO_MEMORY, UNAVAILABLE, DROPPED_OUT, TOO_LATE], TRAINS
        ).astype(np.uint8)  # (U,)
        seconds = np.minimum(np.where(leaves, worked_s, all_s), self._deadline_s)
        seconds[stays | absent] = 0
        # The server cannot tell a dropout from a slow device: it waits until the deadline for both.
        missing = (outcomes >= DROPPED_OUT).any()
        round_s = self._deadline_s if missing else float(seconds.max(initial=0))
        return RoundParticipation(task, outcomes, seconds, VirtualTime(start_s, round_s))

    @property
    def _cap_mb(self) -> float:
        return self._config.memory_mb or np.inf

    @property
    def _deadline_s(self) -> float:
        return self._config.deadline_s or self._config.round_interval_s

    def _coins(self, purpose: str, counter: int, task: RoundTask) -> npt.NDArray[np.float32]:
        """Return one uniform number for each device of the cohort (U,), a function of seed, counter and device."""
        coins = stream(self._key, purpose, counter).random(len(self._devices.row), np.float32)  # (N,)
        return coins[task.cohort]


def _transfer_s(num_bytes: npt.NDArray[np.int64] | int, mbit: npt.NDArray[np.float32]) -> Figures:
    return np.asarray(8 * num_bytes / _BITS_PER_MEGABIT / mbit.astype(np.float64))
