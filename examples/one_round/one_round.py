"""Federated private rounds in one file: what `fedlm simulate` does, out of the library's plain parts.

The server's half, `federated_round`, is numpy alone: a cohort, an exact sum of clipped updates, one noised release, one
step of the strategy. Devices are a function from a device's number to its update; here they train a small model.
The same experiment then runs through the engine, and the two models have the same bits. Bits can be compared because
noise and cohorts follow from the seed, which they must never do in a run for real people.

    python one_round.py [key=value]...
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import fedlm
from fedlm.config.schema import Config
from fedlm.experiment import Experiment
from fedlm.privacy.clipping.clipped_sum import new_sum
from fedlm.randomness import round_key
from fedlm.strategies.fedavg import FedAvg
from fedlm.strategies.round_specs import RoundSpecs
from fedlm.strategies.server_step import ServerState, step
from fedlm.trainable.parts import Part
from fedlm.trainable.rows import row_set
from fedlm.trainable.spec import Vector
from fedlm.training.grouped.trainer import GroupTrainer

TINY = [
    "rounds=2", "data.corpus=synthetic", "synthetic.users=40", "synthetic.tokens_per_user=40", "synthetic.classes=16",
    "vocabulary.size=300", "model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.base=random",
    "trainable.lora.rank=0", "trainable.dense=['*']", "trainable.embedding_rows.count=50", "loss.negatives=32",
    "strategy.kind=fedavg", "fleet.cohort=8", "privacy.reproducible_noise=true", "privacy.reproducible_cohorts=true",
    "privacy.delta=1e-3", "execution.grid=inprocess", "execution.group_size=1", "execution.products=fp32",
]  # fmt: skip
Devices = Callable[[fedlm.UpdateSpec, dict[str, Vector], int, int], Sequence[Part]]
"""From what moves in a round, the server's blocks, the round's number and a device's number to that device's update."""


def federated_round(
    plan: fedlm.PrivacyPlan, strategy: fedlm.Strategy, state: ServerState, specs: RoundSpecs, t: int, devices: Devices
) -> ServerState:
    """Return the server's state after round t."""
    clip = plan.clip_spec(state.privacy, specs.sends, t)  # public: every device gets it
    blocks = (specs.moves.full or specs.moves).views(state.model.values)
    total = new_sum(clip, specs.sends.size)  # integers: the order of devices cannot change it
    for device in plan.sample_cohort(t).tolist():
        total.add_parts(devices(specs.moves, blocks, t, device))  # clips, then adds
    release: fedlm.Release = plan.release(total, t, specs.sends)  # noised; the sum is empty from here on
    return step(strategy, plan, state, release, clip=clip, changes=specs.changes)[0]


def by_hand(config: Config) -> Vector:
    """Return the model (P_full,) after all rounds of an experiment."""
    experiment = Experiment.open(config)
    trainable, frequencies = experiment.trainable(), experiment.vocabulary.frequencies
    spec, rows, seed = trainable.spec, config.trainable.embedding_rows, config.seed
    fleet = experiment.fleet  # (N,) whose text each device has
    plan = fedlm.PrivacyPlan.create(
        config.privacy, rounds=config.rounds, fleet_size=len(fleet), cohort=config.fleet.cohort, seed=seed, rows=rows
    )
    trainer, strategy = GroupTrainer(trainable, config, frequencies), FedAvg(config.strategy)

    def devices(moves: fedlm.UpdateSpec, blocks: dict[str, Vector], t: int, device: int) -> Sequence[Part]:
        trainable.bind_tables(blocks)
        trainer.start_round(moves, blocks)
        text = experiment.store.tokens(int(fleet[device]))
        return trainer.train([text], key=round_key(seed, t), devices=[device])[0].parts

    def specs(t: int) -> RoundSpecs:
        return RoundSpecs.of(strategy, spec, t, row_set(rows, frequencies, seed=seed, round_number=t))

    state = ServerState(strategy.init(spec, trainable.initial_values()), plan.first_state(specs(1).sends))
    for t in range(1, config.rounds + 1):
        state = federated_round(plan, strategy, state, specs(t), t, devices)
    return state.model.values


def by_engine(config: Config) -> Vector:
    """Return the model (P_full,) that `fedlm simulate` trains."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        fedlm.simulate(config, run, listener=lambda event: None)
        return load_file(run / "checkpoints" / f"round_{config.rounds:06d}.safetensors")["values"]


if __name__ == "__main__":
    experiment = fedlm.load_config(None, [*TINY, *sys.argv[1:]])
    ours, engines = by_hand(experiment), by_engine(experiment)
    print(f"{ours.size:,} coordinates, {np.count_nonzero(ours != engines):,} of them differ")
    sys.exit(0 if ours.tobytes() == engines.tobytes() else "the bits differ")
