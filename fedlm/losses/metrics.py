"""Figures of held-out text beside perplexity: `evaluation.metrics` names classes of `registry.EVALUATION_METRICS`.

A metric turns the scored tokens of one user into a few numbers; nodes add them up user by user, the server part by part
in a fixed order, and the metric makes figures of the sums. They stand under "evaluation" in metrics.jsonl and in the
report.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedlm.config.keys import typed_options
from fedlm.config.schema import EvaluationConfig
from fedlm.registry import EVALUATION_METRICS, NoOptions

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ScoredTokens:
    """Some tokens of one held-out user.

    Arguments:
        targets: (N,) word ids.
        nll: (N,) negative log likelihood of each, nats.
        hidden: (N, D) final hidden states.
        table: (V, D) output embedding.
        bias: (V,) or None.
        frequencies: (V,) public word frequencies.
        chunk: Vocabulary entries to hold scores of at a time.
    """

    targets: Tensor
    nll: Tensor
    hidden: Tensor
    table: Tensor
    bias: Tensor | None
    frequencies: Floats
    chunk: int


class EvaluationMetric(ABC):
    """A figure of held-out text.

    Arguments:
        options: An instance of the class's `Options`.
    """

    name: ClassVar[str]
    """What the section [evaluation.options.name] is called."""
    Options: ClassVar[type] = NoOptions
    """Its options: a frozen dataclass whose fields are made with `fedlm.config.schema.option`."""
    size: int = 1
    """Numbers that are added up."""

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    @abstractmethod
    def contribution(self, scored: ScoredTokens) -> Sequence[float]:
        """Return what some tokens of a user add, `size` numbers; it is called once for each part of a user's text."""

    @abstractmethod
    def figures(self, totals: Floats) -> dict[str, float]:
        """Return figures by name from the sums (size,) over all users."""


class NextWordAccuracy(EvaluationMetric):
    """Part of the tokens that the model ranks first."""

    name = "next_word_accuracy"
    size = 2

    def contribution(self, scored: ScoredTokens) -> Sequence[float]:
        """Return tokens ranked first, and all."""
        best = scored.hidden.new_full((len(scored.targets),), -torch.inf)  # (N,)
        ids = torch.zeros_like(scored.targets)  # (N,)
        for start in range(0, len(scored.table), scored.chunk):
            part = slice(start, start + scored.chunk)
            scores = scored.hidden @ scored.table[part].T  # (N, W)
            found = (scores if scored.bias is None else scores + scored.bias[part]).max(-1)
            better = found.values > best
            ids[better] = found.indices[better] + start
            best = torch.maximum(best, found.values)
        return [float((ids == scored.targets).sum()), float(len(scored.targets))]

    def figures(self, totals: Floats) -> dict[str, float]:
        """Return the part."""
        return {self.name: float(totals[0] / max(totals[1], 1.0))}


def metrics_of(config: EvaluationConfig) -> list[EvaluationMetric]:
    """Return the metrics that a config names, with their options.

    Raises:
        ConfigError: No such metric, or an option that it does not have.
    """
    found = []
    for name in config.metrics:
        kind, short = EVALUATION_METRICS.resolve(name), EVALUATION_METRICS.short_name(name)
        section = f"{EVALUATION_METRICS.options_key}.{short}"
        found.append(kind(typed_options(kind, config.options.of(short), section)))
    return found


def contributions(metrics: Sequence[EvaluationMetric], scored: ScoredTokens) -> tuple[float, ...]:
    """Return what some tokens add to every metric, one after another, ready for `Score.metrics`."""
    return tuple(float(number) for metric in metrics for number in metric.contribution(scored))


def evaluation_figures(config: EvaluationConfig, totals: Sequence[float]) -> dict[str, float]:
    """Return the figures of all metrics from the sums of their numbers, in the order of `contributions`."""
    figures: dict[str, float] = {}
    start = 0
    for metric in metrics_of(config):
        figures |= metric.figures(np.asarray(totals[start : start + metric.size], np.float64))
        start += metric.size
    return figures
