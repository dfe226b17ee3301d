"""What the canary devices of an audit contribute, in place of training or before it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedlm.auditing.text import canary_text
from fedlm.experiment import Experiment
from fedlm.privacy.clipping.clipped_sum import ClippedSum
from fedlm.trainable.parts import Part
from fedlm.trainable.spec import UpdateSpec, Vector

_NOTHING = Part(0, np.full(1, math.nan, np.float32))
"""An update that is not finite: it counts as a device and contributes zero, to the answers beside the update too."""

_EXCESS = 10.0
"""Norm of a canary's update before the clip, in clip norms."""


class CanaryDevices:
    """The canaries among a node's devices.

    Arguments:
        experiment: Says which devices are canaries, and what they hold.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._experiment, self._canaries = experiment, experiment.canaries

    def contribute(self, total: ClippedSum, spec: UpdateSpec, devices: list[int]) -> list[int]:
        """Add what canaries contribute without training, each clipped like any device; returns who has to train.

        Arguments:
            total: The node's sum.
            spec: Of the round.
            devices: Of one group.
        """
        training = []
        for device in devices:
            number = self._canaries.number(device)
            if number is None:
                training.append(device)
            elif not self._canaries.is_member(number):
                total.add_parts([_NOTHING])
            elif self._canaries.is_text(number):
                training.append(device)
            else:
                total.add(self._update(number, total, spec))
        return training

    def tokens(self, device: int) -> npt.NDArray[np.int32] | None:
        """Return the text (n,) of a text canary; None for any other device."""
        number = self._canaries.number(device)
        if number is None or not self._canaries.is_text(number):
            return None
        return canary_text(self._experiment.config, self._experiment.vocabulary, number)

    def _update(self, number: int, total: ClippedSum, spec: UpdateSpec) -> Vector:
        """Return an update (P,) that the clip turns into C c_j in its own coordinates; without a clip it stands out."""
        update = self._canaries.signs(number, spec)
        norm = _EXCESS * total.clip_norm if math.isfinite(total.clip_norm) else 1.0
        update *= np.float32(norm / math.sqrt(spec.size))
        if total.clip_spec.block_scaling:
            total.clip_spec.block_scaling.restore(update)
        return update
