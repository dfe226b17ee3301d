"""What a round tells is numbers, whatever the nodes' figures were."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fedlm.messages import EMPTY_IDS, TrainReply
from server.round_lines import CohortReport


def reply(devices: list[int], norms: list[float], losses: list[float]) -> TrainReply:
    return TrainReply(False, np.array(devices), np.array(norms), np.array(losses), EMPTY_IDS, [], 1.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1e308])
def test_figures_of_diverged_devices_are_none_and_no_error(loss: float) -> None:
    report = CohortReport(5, 1.0)
    report.add(0, reply([1, 2], [0.5, 1e308], [loss, loss]))
    report.add(1, reply([3], [2.0], [1.0]))
    found = report.non_private()
    json.dumps(found, allow_nan=False)
    assert found["train_loss"] is None
    assert found["clip_fraction"] == pytest.approx(2 / 3)


def test_nodes_that_keep_their_figures_are_left_out_of_the_means() -> None:
    report = CohortReport(5, 1.0)
    report.add(0, reply([1, 2], [], []))
    report.add(1, reply([3], [2.0], [4.0]))
    assert report.non_private()["train_loss"] == 4.0
    assert report.num_trained == 3
