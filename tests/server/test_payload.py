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
        assert meter.download(cohort, rows).tolist() == expected
        arrived = cohort[rng.random(len(cohort)) < 0.8]  # the others turn away before the download
        meter.visited(arrived, t)
        copies[arrived] = server
        server[rows] = t
        meter.changed(rows, t)


def test_without_embedding_rows_only_the_fixed_part_travels() -> None:
    meter = DownloadMeter(UpdateSpec.build([("a", "lora_a", (2, 3))]), 5, 3)
    assert meter.download(np.array([1, 4]), np.empty(0, np.int64)).tolist() == [24, 24]
    meter.changed(np.empty(0, np.int64), 1)
