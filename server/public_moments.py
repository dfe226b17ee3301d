"""What users who publish their text tell about the kinds of blocks before round 1
(`fedlm.privacy.adaptive.allocation`).

The public and the per-group allocation need m_g = E |Delta_g|^2 and w_g, the harm of noise in a coordinate: as for a
natural gradient, the mean squared gradient, `m_g / (d_g rate_g^2)` since an update is gradients times local rates.
Volunteers train here as devices would; nobody else's data is looked at, so the scales that follow are public. They
train for some rounds of FedAvg without noise, and only the last counts: at the base itself a LoRA factor B is zero, and
so is the gradient of its A, which says nothing about the rounds to come.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from fedlm.config.schema import LocalConfig
from fedlm.errors import ConfigError
from fedlm.experiment import Experiment
from fedlm.privacy.adaptive.allocation import group_sizes, groups_of
from fedlm.randomness import round_key
from fedlm.trainable.build import Trainable
from fedlm.trainable.rows import row_set
from fedlm.trainable.spec import UpdateSpec, Vector
from fedlm.training.local import LocalTrainer

NEEDED_BY = ("public", "per_group")
_NUM_USERS, _NUM_ROUNDS = 32, 6
_LEAST = 1e-4  # of the energy, for a block that did not move at all


@dataclass(frozen=True)
class PublicMoments:
    """By kind of block, up to factors; empty where the allocation needs none.

    Arguments:
        moments: m_g.
        importance: w_g.
    """

    moments: dict[str, float] = field(default_factory=dict)
    importance: dict[str, float] = field(default_factory=dict)


def public_moments(experiment: Experiment, trainable: Trainable) -> PublicMoments:
    """Return the moments of public users; nothing where the allocation needs none.

    Arguments:
        experiment: Config and data.
        trainable: Freshly built; its values are left as they were, its tables in memory of their own.

    Raises:
        ConfigError: The allocation needs public users, and there are none, or all of them diverge.
    """
    config, store = experiment.config, experiment.store
    if not config.privacy.enabled or config.privacy.allocation not in NEEDED_BY:
        return PublicMoments()
    users = store.users("public")[:_NUM_USERS]
    if not len(users):
        raise ConfigError(
            f"privacy.allocation = {config.privacy.allocation!r} takes its scales from public users, but there are "
            "none; set data.public_fraction above 0, or privacy.allocation = 'adaptive'"
        )
    frequencies = experiment.vocabulary.frequencies
    rows = row_set(config.trainable.embedding_rows, frequencies, seed=config.seed, round_number=1)
    spec, values = trainable.spec.with_rows(rows), trainable.initial_values()
    start, blocks = values.copy(), trainable.spec.views(values)  # the blocks move with the values
    trainable.bind_tables(blocks)
    trainer = LocalTrainer(trainable, config, frequencies)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same bits on every machine of a kind
    try:
        for number in range(_NUM_ROUNDS):
            trainer.start_round(spec, blocks)
            key = round_key(config.seed, -number)  # of no round of the run
            updates = [trainer.train(store.tokens(u), key=key, device=i).update for i, u in enumerate(users.tolist())]
            step = np.mean([_clipped(update, config.privacy.clip_norm) for update in updates], axis=0)
            spec.scatter(values, spec.gather(values) + step)
    finally:
        torch.set_num_threads(threads)
        values[...] = start
        trainable.load(blocks)
    return _moments(spec, [update for update in updates if np.isfinite(update).all()], config.local)


def _moments(spec: UpdateSpec, updates: list[Vector], rates: LocalConfig) -> PublicMoments:
    if not updates:
        raise ConfigError("every public user's training diverges; lower local.learning_rate and row_learning_rate")
    squares: dict[str, float] = dict.fromkeys((block.kind for block in spec.blocks), 0.0)
    for block in spec.blocks:
        squares[block.kind] += float(
            np.mean([np.square(block.view(update), dtype=np.float64).sum() for update in updates])
        )
    least = _LEAST * sum(squares.values()) + np.finfo(np.float64).tiny
    moments = {kind: max(square, least) for kind, square in squares.items()}
    sizes = dict(zip(groups_of(spec), group_sizes(spec).tolist(), strict=True))
    importance = {
        kind: moment / (sizes[kind] * (rates.row_learning_rate if kind == "rows" else rates.learning_rate) ** 2)
        for kind, moment in moments.items()
    }
    return PublicMoments(moments, importance)


def _clipped(update: Vector, clip_norm: float) -> Vector:
    norm = float(np.linalg.norm(update.astype(np.float64)))
    return update * np.float32(min(1.0, clip_norm / norm)) if 0 < norm < np.inf else np.zeros_like(update)
