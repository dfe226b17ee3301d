"""How the energy of an update is spread over the kinds of blocks, from users who publish their text.

The public and the per-group allocation need it before round 1 (`fedlm.privacy.allocation`). Volunteers train here as
devices would; nobody else's data is looked at, so the scales that follow are public.
"""

from __future__ import annotations

import numpy as np
import torch

from fedlm.errors import ConfigError
from fedlm.experiment import Experiment
from fedlm.randomness import round_key
from fedlm.trainable.build import Trainable
from fedlm.trainable.rows import row_set
from fedlm.training.local import LocalTrainer

NEEDED_BY = ("public", "per_group")
_NUM_USERS = 32


def public_moments(experiment: Experiment, trainable: Trainable) -> dict[str, float]:
    """Return the mean of |Delta_g|^2 over public users by kind of block; empty where the allocation needs none.

    Arguments:
        experiment: Config and data.
        trainable: Freshly built; it is left as it was.

    Raises:
        ConfigError: The allocation needs public users, and there are none.
    """
    config, store = experiment.config, experiment.store
    if not config.privacy.enabled or config.privacy.allocation not in NEEDED_BY:
        return {}
    users = store.users("public")[:_NUM_USERS]
    if not len(users):
        raise ConfigError(
            f"privacy.allocation = {config.privacy.allocation!r} takes its scales from public users, but there are "
            "none; set data.public_fraction above 0, or privacy.allocation = 'adaptive'"
        )
    frequencies = experiment.vocabulary.frequencies
    rows = row_set(config.trainable.embedding_rows, frequencies, seed=config.seed, round_number=1)
    spec, blocks = trainable.spec.with_rows(rows), trainable.initial_blocks(copy_tables=True)
    trainer = LocalTrainer(trainable, config, frequencies)
    trainer.start_round(spec, blocks)
    squares: dict[str, float] = dict.fromkeys((block.kind for block in spec.blocks), 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same bits on every machine of a kind
    try:
        for number, user in enumerate(users.tolist()):
            update = trainer.train(store.tokens(user), key=round_key(config.seed, 0), device=number).update
            for block in spec.blocks:
                squares[block.kind] += float(np.square(block.view(update), dtype=np.float64).sum()) / len(users)
    finally:
        torch.set_num_threads(threads)
        trainable.load(blocks)
    return squares
