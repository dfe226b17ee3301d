"""Metrics that leave devices with noise: `privacy.metrics` names classes of `fedlm.registry.DP_METRICS`.

Each is one number of a device, clipped to [0, bound], so that one device moves the sum by no more than the bound. It
rides along with the update (`fedlm.privacy.clipping.side_queries.DPMetrics`) and takes `share` of the clip norm from
it: the smaller, the noisier the metric and the less noisy the update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from fedlm.config.built_in_options import NumTokensOptions, TrainLossOptions
from fedlm.privacy.clipping.query_input import QueryInput
from fedlm.registry import NoOptions


class DPMetric(ABC):
    """One number of a device.

    Arguments:
        options: An instance of the class's `Options`.
    """

    name: ClassVar[str]
    """What figures, the report and the section [privacy.metric_options.name] call it."""
    Options: ClassVar[type] = NoOptions
    """Its options: a frozen dataclass whose fields are made with `fedlm.config.schema.option`."""
    share: ClassVar[float] = 0.1
    """Of the clip norm: with 0.1 its noise multiplier is ten times the update's."""
    wants_words: ClassVar[bool] = False
    """Whether `value` looks at the words of the device."""
    reads_training: ClassVar[bool] = True
    """Whether it tells of the device's own training, which devices with local.example_dp do not."""

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    @property
    @abstractmethod
    def bound(self) -> float:
        """The largest value; a larger one counts as this."""

    @abstractmethod
    def value(self, seen: QueryInput) -> float:
        """Return one device's number; below zero counts as zero, not a number as the bound."""


class TrainLoss(DPMetric):
    """Mean training loss."""

    name = "train_loss"
    Options: ClassVar[type] = TrainLossOptions

    @property
    def bound(self) -> float:
        """As the options have it."""
        return float(self.options.bound)

    def value(self, seen: QueryInput) -> float:
        """Return the loss."""
        return seen.device_stats.loss


class NumTokens(DPMetric):
    """Targets that a device trained on."""

    name = "num_tokens"
    Options: ClassVar[type] = NumTokensOptions

    @property
    def bound(self) -> float:
        """As the options have it."""
        return float(self.options.bound)

    def value(self, seen: QueryInput) -> float:
        """Return their number."""
        return float(seen.device_stats.num_tokens)


class ClipFraction(DPMetric):
    """Part of the updates that were longer than the clip norm."""

    name = "clip_fraction"
    reads_training = False

    @property
    def bound(self) -> float:
        """One."""
        return 1.0

    def value(self, seen: QueryInput) -> float:
        """Return one for a clipped update, else zero."""
        return float(seen.norm > seen.clip_norm)
