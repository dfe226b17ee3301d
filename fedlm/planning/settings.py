"""Which settings fit a device: rank, rows, loss and batch size around the config that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from fedlm.config.schema import Config, OptionValues
from fedlm.config.validate import problems
from fedlm.models.base import LanguageModel
from fedlm.planning.device_cost import CostModel
from fedlm.planning.forecast import (
    Counts,
    Device,
    Floats,
    Payload,
    noise_to_signal,
    payload,
    round_time,
    schedule_of,
)
from fedlm.privacy.plan_parameters import PlanParameters
from fedlm.trainable.build import build_trainable
from fedlm.trainable.spec import UpdateSpec

RANKS, ROWS, BATCHES = (0, 4, 16), (0, 2_000, 5_000, 10_000), (4, 16)
LOSSES = ("nce", "full_softmax")
MOST_NOISE = 1.0  # noise-to-signal of a round: beyond, the noise is longer than the longest possible mean update


@dataclass(frozen=True)
class PlannedSetting:
    """One choice and what it costs.

    Arguments:
        rank, rows, loss, batch_size: The choice; `asked` if it is the config's own.
        bytes_up, bytes_down: Of a device that has taken part before.
        peak_mb: Of the largest user.
        round_s: Of the largest user.
        noise_to_signal: sqrt(P) z / n.
        fits: Whether the largest user keeps memory and deadline, and the noise its limit.
        misses: What is not kept: "memory", "deadline", "noise".
    """

    rank: int
    rows: int
    loss: str
    batch_size: int
    asked: bool
    bytes_up: int
    bytes_down: int
    peak_mb: float
    round_s: float
    noise_to_signal: float
    fits: bool
    misses: tuple[str, ...]


def settings(
    config: Config,
    new_model: Callable[[], LanguageModel],
    frequencies: Floats,
    num_tokens: Counts,
    plan_parameters: PlanParameters,
    device: Device,
    *,
    most_noise: float = MOST_NOISE,
) -> list[PlannedSetting]:
    """Return every setting, those that fit first, within them the least noise-to-signal first.

    Arguments:
        config: What was asked.
        new_model: Makes a model without adapters; its values do not matter.
        frequencies: Public word frequencies (V,).
        num_tokens: Of the fleet's users (U,).
        plan_parameters: The privacy plan's: noise multiplier and cohort do not depend on these settings.
        device: What must suffice.
        most_noise: The largest noise-to-signal of a round that still fits.
    """
    largest = int(num_tokens.max())
    found, models = [], dict[tuple[int, bool], tuple[LanguageModel, UpdateSpec]]()
    for choice in _around(config, len(frequencies)):
        kind = (choice.trainable.lora.rank, choice.trainable.embedding_rows.count > 0)
        if kind not in models:
            model = new_model()
            models[kind] = (model, build_trainable(model, choice).spec)
        model, full = models[kind]
        schedule = schedule_of(choice, full, frequencies)
        cost = CostModel(choice, schedule.most_trained, model, frequencies=frequencies)
        moved = payload(choice, schedule, frequencies, plan_parameters)
        setting = _priced(choice, cost, schedule.most_sent, moved, largest, plan_parameters, device)
        found.append(_judged(replace(setting, asked=choice == config), device, most_noise))
    return sorted(found, key=lambda s: (not s.fits, s.noise_to_signal, s.round_s, s.peak_mb))


def _priced(
    config: Config,
    cost: CostModel,
    spec: UpdateSpec,
    moved: Payload,
    largest: int,
    plan_parameters: PlanParameters,
    device: Device,
) -> PlannedSetting:
    """Return a choice with its price; whether it is the asked one, and fits, is for others to say."""
    return PlannedSetting(
        rank=config.trainable.lora.rank,
        rows=config.trainable.embedding_rows.count,
        loss=config.loss.kind,
        batch_size=config.local.batch_size,
        asked=False,
        bytes_up=moved.up,
        bytes_down=moved.down_again,
        peak_mb=float(sum(part[0] for part in cost.parts_mb(np.array([largest])).values())),
        round_s=round_time(cost, device, moved, largest, plan_parameters).round_s,
        noise_to_signal=noise_to_signal(spec, plan_parameters)["all"],
        fits=True,
        misses=(),
    )


def _judged(setting: PlannedSetting, device: Device, most_noise: float) -> PlannedSetting:
    kept = {
        "memory": setting.peak_mb <= device.ram_mb,
        "deadline": setting.round_s <= device.deadline_s,
        "noise": setting.noise_to_signal <= most_noise,
    }
    misses = tuple(name for name, is_kept in kept.items() if not is_kept)
    return replace(setting, fits=not misses, misses=misses)


def _around(config: Config, vocabulary_size: int) -> Iterator[Config]:
    """Yield the grid's configs that are valid, the asked one among them."""
    trainable = config.trainable
    ranks = sorted({*RANKS, trainable.lora.rank})
    counts = sorted({count for count in ROWS if count <= vocabulary_size} | {trainable.embedding_rows.count})
    batches = sorted({*BATCHES, config.local.batch_size})
    losses = dict.fromkeys((config.loss.kind, *LOSSES))
    for rank, count, loss, batch in product(ranks, counts, losses, batches):
        rows = replace(trainable.embedding_rows, count=count)
        choice = replace(
            config,
            trainable=replace(trainable, lora=replace(trainable.lora, rank=rank), embedding_rows=rows),
            loss=config.loss if loss == config.loss.kind else replace(config.loss, kind=loss, options=OptionValues()),
            local=replace(config.local, batch_size=batch),
        )
        if not any(problems(choice)):
            yield choice
