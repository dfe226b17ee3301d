"""The download meter against a device that is simulated row by row."""

from __future__ import annotations

import numpy as np

from fedlm.trainable.spec import UpdateSpec
from server.payload import DownloadMeter


def test_download_equals_rows_that_differ_from_the_devices_copy() -> None:
    vocabulary, devices, rounds = 30, 8, 25
    full = UpdateSpec.build(
        [("a", "lora_a", (2, 3)), ("input_table", "rows", (vocabulary, 4)), ("output_bias", "rows", (vocabulary,))]
    )
    meter = DownloadMeter(full, devices, rounds)
    rng = np.random.default_rng(0)
    server = np.zeros(vocabulary, np.int64)  # version of each row
    copies = np.zeros((devices, vocabulary), np.int64)  # each device's
    for t in range(1, rounds + 1):
        cohort = np.flatnonzero(rng.random(devices) < 0.4)
        rows = np.sort(rng.choice(vocabulary, 6, replace=False))
        stale = [(copies[d] != server).sum() for d in cohort]
        expected = [4 * 6 + 4 * (5 + 1) * n + 4 * 6 for n in stale]
        assert meter.download(cohort, full.with_rows(rows)).tolist() == expected
        arrived = cohort[rng.random(len(cohort)) < 0.8]  # the others turn away before the download
        meter.visited(arrived, t)
        copies[arrived] = server
        server[rows] = t
        meter.changed(full.with_rows(rows), t)


def test_a_device_downloads_the_blocks_that_changed_since_its_last_visit() -> None:
    """Two blocks that change in turn; a first visit takes both, a device that stays takes the other one each time."""
    full = UpdateSpec.build([("a", "lora_a", (2, 3)), ("b", "lora_b", (5, 2))])
    bytes_of, meter = {"a": 24, "b": 40}, DownloadMeter(full, 3, 9)
    last = dict.fromkeys(range(3), -1)  # round before which each device was there
    changed = {"a": 0, "b": 0}
    for t in range(1, 9):
        name, cohort = "ab"[t % 2], np.flatnonzero([True, t % 3 == 0, t == 7])
        spec = full.with_rows(np.empty(0, np.int64), [name])
        expected = [sum(bytes_of[n] for n, when in changed.items() if when > last[d]) for d in cohort.tolist()]
        assert meter.download(cohort, spec).tolist() == expected
        meter.visited(cohort, t)
        last |= dict.fromkeys(cohort.tolist(), t - 1)
        meter.changed(spec, t)
        changed[name] = t
