"""One experiment's forecast: payload, device memory, noise-to-signal, time per round.

Everything follows from sizes: of the model, of what trains, of the users' texts. No base is needed and nobody's text is
read but for its length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlm.config.schema import Config
from fedlm.experiment import Experiment
from fedlm.models.base import LanguageModel
from fedlm.models.factory import empty_model
from fedlm.planning.device_cost import CostModel
from fedlm.planning.touched_pages import received_probabilities
from fedlm.privacy.plan_parameters import PlanParameters
from fedlm.strategies.contract import strategy_of
from fedlm.strategies.round_specs import Schedule
from fedlm.trainable.rows import row_set
from fedlm.trainable.spec import UpdateSpec

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Device:
    """What a device can do, and what is asked of it.

    Arguments:
        ram_mb: Memory that training may take; infinity: no limit.
        bandwidth_mbit: Of its network, each way, in 1e6 bits per second.
        gflops: Sustained 1e9 floating-point operations per second.
        deadline_s: Seconds until a round takes no more replies; infinity: no limit.
    """

    ram_mb: float = math.inf
    bandwidth_mbit: float = 20.0
    gflops: float = 10.0
    deadline_s: float = math.inf


@dataclass(frozen=True)
class Payload:
    """Bytes that a device moves in one round.

    Arguments:
        up: The update, fp32; the mean over the rounds where a strategy sends other blocks in other rounds.
        up_by_kind: The same by kind of block.
        down_first: Down, when the device takes part for the first time, and that in the last round.
        down_again: Down, when it took part `rounds_between` rounds ago.
        rounds_between: Rounds from one visit of a device to its next, in the mean; beyond the run, few come twice.
    """

    up: int
    up_by_kind: dict[str, int]
    down_first: int
    down_again: int
    rounds_between: float


@dataclass(frozen=True)
class RoundTime:
    """Seconds of one round on a device of median text that has taken part before, and of the whole run."""

    compute_s: float
    transfer_s: float
    round_s: float
    rounds: int
    device_rounds: float
    device_hours: float


def structure(experiment: Experiment) -> LanguageModel:
    """Return a new model of the experiment without adapters; it needs no base, for its values do not matter."""
    if experiment.pretrained is not None:
        return experiment.pretrained.model()
    return empty_model(experiment.config, experiment.vocabulary.size)


def schedule_of(config: Config, full: UpdateSpec, frequencies: Floats) -> Schedule:
    """Return what trains and travels in each round, with the row set of the first: all rounds have its size."""
    rows = row_set(config.trainable.embedding_rows, frequencies, seed=config.seed, round_number=1)
    return Schedule.of(strategy_of(config.strategy), full, config.rounds, rows)


def payload(config: Config, schedule: Schedule, frequencies: Floats, plan_parameters: PlanParameters) -> Payload:
    """Return the bytes of a round; what is downloaded is the mean over row sets (`server.payload` counts real ones).

    Arguments:
        config: The experiment.
        schedule: Of the run.
        frequencies: Public word frequencies (V,).
        plan_parameters: Of the privacy plan: fleet, cohort, rounds.
    """
    between, full = plan_parameters.fleet_size / plan_parameters.cohort, schedule.full
    row_ids = schedule.rounds[0].moves.row_ids

    def down(num_rounds: float, fixed_bytes: int) -> int:
        changed = received_probabilities(config.trainable.embedding_rows, frequencies, num_rounds).sum()
        rows = 4 * (full.row_size + 1) * changed if full.row_blocks else 0.0
        return round(fixed_bytes + rows + 4 * len(row_ids if row_ids is not None else ()))

    again = min(between, plan_parameters.rounds - 1)
    by_kind = {kind: round(num_bytes) for kind, num_bytes in schedule.mean_bytes_by_kind().items()}
    return Payload(
        up=sum(by_kind.values()),
        up_by_kind=by_kind,
        down_first=down(plan_parameters.rounds - 1, 4 * full.fixed_size),
        down_again=down(again, schedule.changed_bytes(again)),
        rounds_between=between,
    )


def noise_to_signal(spec: UpdateSpec, plan_parameters: PlanParameters) -> dict[str, float]:
    """Return the noise's expected L2 norm over the largest signal, C, overall and by kind of block.

    The mean of n clipped updates is at most C long; P coordinates of its noise are sqrt(P) as long as one.
    """
    scale = plan_parameters.query_std(1.0, 1.0)
    kinds = {kind: scale * math.sqrt(num_bytes / 4) for kind, num_bytes in spec.bytes_by_kind().items()}
    return {"all": scale * math.sqrt(spec.size)} | kinds


def round_time(
    cost: CostModel, device: Device, moved: Payload, num_tokens: int, plan_parameters: PlanParameters
) -> RoundTime:
    """Return the time of a round on a device with `num_tokens` tokens, and what the run asks of the fleet."""
    compute_s = float(cost.gigaflops(np.array([num_tokens]))[0]) / device.gflops
    transfer_s = 8 * (moved.up + moved.down_again) / (1e6 * device.bandwidth_mbit)
    total_s, device_rounds = compute_s + transfer_s, float(plan_parameters.rounds * plan_parameters.cohort)
    return RoundTime(
        compute_s,
        transfer_s,
        total_s,
        plan_parameters.rounds,
        device_rounds,
        device_hours=total_s * device_rounds / 3600,
    )


def memory_parts(cost: CostModel, config: Config, num_tokens: Counts) -> dict[str, dict[str, float]]:
    """Return MB by part for the median and the largest user, and for a full batch, whoever may have one.

    Arguments:
        cost: Of the round.
        config: The experiment.
        num_tokens: Of the fleet's users (U,).
    """
    full_batch = config.data.sequence_length * config.local.batch_size + 1
    sizes = {"median user": int(np.median(num_tokens)), "largest user": int(num_tokens.max()), "full batch": full_batch}
    table = cost.parts_mb(np.array(list(sizes.values())))
    found = {}
    for place, (name, tokens) in enumerate(sizes.items()):
        parts = {part: float(values[place]) for part, values in table.items()}
        found[name] = {"tokens": float(tokens), "total": sum(parts.values()), **parts}
    return found
