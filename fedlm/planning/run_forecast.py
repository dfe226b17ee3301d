"""The whole forecast of one experiment, as `fedlm plan` prints it and `fedlm.plan` returns it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from fedlm.experiment import Experiment
from fedlm.planning.device_cost import CostModel
from fedlm.planning.forecast import (
    Device,
    Payload,
    RoundTime,
    memory_parts,
    noise_to_signal,
    payload,
    round_time,
    schedule_of,
    structure,
)
from fedlm.planning.settings import MOST_NOISE, PlannedSetting, settings
from fedlm.privacy.guarantee import Guarantee
from fedlm.privacy.plan_parameters import PlanParameters
from fedlm.trainable.build import build_trainable

_OF_PLAIN_SGD = (
    "memory, time and the settings that fit are of plain SGD; local.example_dp also holds the gradients of single "
    "examples, so devices need more"
)


@dataclass(frozen=True)
class Forecast:
    """What an experiment will cost its devices and the privacy budget.

    Arguments:
        coordinates: P, of a round's update.
        payload: Bytes of a round.
        memory_mb: MB by part, of the median user, the largest one and a full batch; with "tokens" and "total".
        users_within_ram: Part of the users whose device has enough memory.
        noise_to_signal: sqrt(P) z / n of a round, overall ("all") and by kind of block.
        noise_multiplier, clip_norm, expected_cohort: z, C and n of the privacy plan.
        guarantee: Of the whole run.
        time: Of a round on the median user's device, and of the run.
        device: What was asked for.
        max_noise_to_signal: The largest noise-to-signal that a setting may have.
        notes: What these figures leave out.
        settings: Rank, rows, loss and batch size around the config, those that fit first.
    """

    coordinates: int
    payload: Payload
    memory_mb: dict[str, dict[str, float]]
    users_within_ram: float
    noise_to_signal: dict[str, float]
    noise_multiplier: float
    clip_norm: float
    expected_cohort: int
    guarantee: Guarantee
    time: RoundTime
    device: Device
    max_noise_to_signal: float
    notes: tuple[str, ...]
    settings: tuple[PlannedSetting, ...]


def forecast(
    experiment: Experiment,
    plan_parameters: PlanParameters,
    guarantee: Guarantee,
    device: Device,
    *,
    most_noise: float = MOST_NOISE,
) -> Forecast:
    """Return the forecast of an experiment; no base is needed and nothing is trained.

    Arguments:
        experiment: Config, vocabulary and the lengths of users' texts.
        plan_parameters: The privacy plan's.
        guarantee: Of the whole run.
        device: What must suffice.
        most_noise: The largest noise-to-signal of a round that still fits.
    """
    config, frequencies = experiment.config, experiment.vocabulary.frequencies
    num_tokens = experiment.store.num_tokens[np.unique(experiment.fleet)]  # (U,)
    model = structure(experiment)
    schedule = schedule_of(config, build_trainable(model, config).spec, frequencies)
    cost, spec = CostModel(config, schedule.most_trained, model, frequencies=frequencies), schedule.most_sent
    moved, new_model = payload(config, schedule, frequencies, plan_parameters), partial(structure, experiment)
    grid = settings(config, new_model, frequencies, num_tokens, plan_parameters, device, most_noise=most_noise)
    return Forecast(
        coordinates=spec.size,
        payload=moved,
        memory_mb=memory_parts(cost, config, num_tokens),
        users_within_ram=float((cost.peak_mb(num_tokens) <= device.ram_mb).mean()),
        noise_to_signal=noise_to_signal(spec, plan_parameters),
        noise_multiplier=plan_parameters.noise_multiplier,
        clip_norm=plan_parameters.clip_norm,
        expected_cohort=plan_parameters.expected_cohort,
        guarantee=guarantee,
        time=round_time(cost, device, moved, int(np.median(num_tokens)), plan_parameters),
        device=device,
        max_noise_to_signal=most_noise,
        notes=(_OF_PLAIN_SGD,) if config.local.example_dp.enabled else (),
        settings=tuple(grid),
    )
