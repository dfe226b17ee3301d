"""What a round's participation says of a cohort: who trains, who downloads, what the ledger's line becomes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlm.trainable.spec import UpdateSpec
from server.participation import (
    DROPPED_OUT,
    OUTCOMES,
    TOO_LATE,
    TRAINS,
    EveryDevice,
    RoundParticipation,
    RoundTask,
    VirtualTime,
)

SPEC = UpdateSpec.build([("w", "dense", (3,))])


def task(num_devices: int) -> RoundTask:
    return RoundTask(5, 10 * np.arange(num_devices), SPEC, 100 + np.arange(num_devices))


@given(st.lists(st.integers(0, len(OUTCOMES) - 1)))
def test_every_device_of_the_cohort_is_counted_once(codes: list[int]) -> None:
    outcomes = np.array(codes, np.uint8)
    participation = RoundParticipation(task(len(codes)), outcomes, np.zeros(len(codes)))
    line = participation.complete({"trained": len(participation.training), "failed": {}, "sampled": -1})
    assert line["trained"] + sum(line["failed"].values()) == line["sampled"] == len(codes)
    assert all(count > 0 for count in line["failed"].values())
    assert participation.training.tolist() == [10 * i for i, code in enumerate(codes) if code == TRAINS]
    downloads = [i for i, code in enumerate(codes) if code in (TRAINS, DROPPED_OUT, TOO_LATE)]
    assert participation.bytes_down.tolist() == [100 + i if i in downloads else 0 for i in range(len(codes))]
    assert participation.bytes_up.tolist() == [12 if code == TRAINS else 0 for code in codes]
    assert (line["downloaded"], line["uploaded"]) == (len(downloads), codes.count(TRAINS))


def test_failures_in_training_stay_beside_those_of_the_fleet() -> None:
    participation = RoundParticipation(
        task(3), np.array([TRAINS, DROPPED_OUT, TRAINS], np.uint8), np.array([4.0, 8.0, 2.0])
    )
    line = participation.complete({"failed": {"IndexError": 1, "dropped out": 1}})
    assert line["failed"] == {"IndexError": 1, "dropped out": 2}
    assert "virtual" not in line


def test_virtual_seconds_are_of_those_that_downloaded() -> None:
    outcomes = np.array([TRAINS, TOO_LATE, OUTCOMES.index("unavailable"), TRAINS], np.uint8)
    participation = RoundParticipation(task(4), outcomes, np.array([1.0, 9.0, 0.0, 2.0]), VirtualTime(600.0, 9.0))
    virtual = participation.complete({"failed": {}})["virtual"]
    assert virtual.pop("device_s_p90") == pytest.approx(7.6)
    assert virtual == {"start_s": 600.0, "round_s": 9.0, "device_s_median": 2.0, "device_s_max": 9.0}


def test_a_cohort_that_stays_away_is_worth_a_warning() -> None:
    away = np.full(4, OUTCOMES.index("not enough memory"), np.uint8)
    assert "nobody takes part" in RoundParticipation(task(4), away, np.zeros(4)).warning()
    assert EveryDevice().participation(task(4)).warning() == EveryDevice().participation(task(0)).warning() == ""


def test_every_device_takes_part() -> None:
    participation = EveryDevice().participation(task(6))
    assert participation.training.tolist() == participation.task.cohort.tolist()
    assert participation.bytes_down.tolist() == participation.task.bytes_down.tolist()
    assert participation.complete({"failed": {}}) == {"failed": {}, "sampled": 6, "downloaded": 6, "uploaded": 6}
