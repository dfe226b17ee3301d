"""What the scaling benchmark reads of a program's memory."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.scaling import settings, watch

HOLD = "import time; b = bytearray(150_000_000); b[::4096] = bytes(len(b[::4096])); time.sleep(2)"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD!r}], check=True)"


def test_memory_of_a_child_counts_for_the_program_and_not_for_the_driver() -> None:
    peaks = watch(subprocess.Popen([sys.executable, "-c", PARENT], text=True))
    assert peaks["driver_mb"] < 100
    assert 150 < peaks["program_mb"] < 300
    assert peaks["worker_mb"] == 0  # it is not Ray's


def test_every_setting_has_a_fleet_as_large_as_its_cohort() -> None:
    for quick in (True, False):
        found = settings(quick=quick)
        assert len(set(found)) == len(found)
        assert all(setting.cohort <= setting.fleet for setting in found)
    assert {setting.cohort for setting in found} >= {100, 10_000}
    assert {setting.fleet for setting in found} >= {1_000, 1_000_000}
