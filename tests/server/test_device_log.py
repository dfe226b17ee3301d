"""devices.csv: every line of every released round, whatever byte a kill left behind."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from fedlm.errors import OutputError
from fedlm.trainable.spec import UpdateSpec
from server.device_log import NAME, DeviceLog
from server.participation import OUTCOMES, RoundParticipation, RoundTask

SPEC = UpdateSpec.build([("w", "dense", (3,))])


def participation(t: int, *codes: int) -> RoundParticipation:
    outcomes = np.array(codes, np.uint8)
    task = RoundTask(t, np.arange(len(codes)) + t, SPEC, np.full(len(codes), 7))
    return RoundParticipation(task, outcomes, np.arange(len(codes)) / 8)


def test_a_line_says_what_became_of_a_device(tmp_path: Path) -> None:
    DeviceLog(tmp_path, enabled=True).append(participation(3, *range(len(OUTCOMES))))
    with (tmp_path / NAME).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["outcome"] for row in rows] == list(OUTCOMES)
    assert list(rows[0].values()) == ["3", "3", "trains", "0.000", "7", str(SPEC.num_bytes)]
    assert [row["bytes_down"] for row in rows] == ["7", "0", "0", "7", "7", "0"]


def test_rewinding_a_file_cut_at_any_byte_keeps_the_released_rounds(tmp_path: Path) -> None:
    log, path = DeviceLog(tmp_path, enabled=True), tmp_path / NAME
    log.append(participation(1, 0, 1))
    released = path.read_bytes()
    log.append(participation(2))
    log.append(participation(12, 0, 4, 2))
    whole = path.read_bytes()
    for end in range(len(released), len(whole) + 1):
        path.write_bytes(whole[:end])
        log.rewind(2)
        assert path.read_bytes() == released
    path.write_bytes(whole)
    log.rewind(12)
    assert path.read_bytes() == whole


def test_a_torn_header_is_written_again(tmp_path: Path) -> None:
    log, path = DeviceLog(tmp_path, enabled=True), tmp_path / NAME
    log.append(participation(1, 0))
    whole = path.read_bytes()
    for end in range(whole.index(b"\n") + 1):
        path.write_bytes(whole[:end])
        log.rewind(0)
        log.append(participation(1, 0))
        assert path.read_bytes() == whole


def test_nothing_is_written_unless_asked_for_and_a_refusal_is_one_line(tmp_path: Path) -> None:
    quiet = DeviceLog(tmp_path, enabled=False)
    quiet.append(participation(1, 0))
    quiet.rewind(0)
    assert not list(tmp_path.iterdir())
    (tmp_path / NAME).mkdir()
    with pytest.raises(OutputError, match=r"devices\.csv cannot be written"):
        DeviceLog(tmp_path, enabled=True).append(participation(1, 0))
