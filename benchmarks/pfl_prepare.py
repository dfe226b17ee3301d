"""What both sides of the comparison with pfl share: users' token arrays, and the weights they start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.matmul_rate import KEY
from benchmarks.pfl_cells import BATCH, LENGTH, SENTENCES
from benchmarks.pfl_ours import cell_config
from fedlm.data.batching import local_batches, sequences
from fedlm.experiment import Experiment
from fedlm.models.base import LanguageModel
from fedlm.models.factory import build_model
from fedlm.models.weights import weights
from fedlm.pretraining.cache import save_base
from fedlm.randomness import stream
from fedlm.trainable.build import build_trainable


def prepare(name: str, folder: Path, corpus: str, num_users: int, *others: str) -> dict[str, int]:
    """Write the arrays of one cell; returns what they hold.

    `tokens.npy` (U, n) is fedlm's input and `batches.npz` pfl's: the very sequences that fedlm cuts, in the order in
    which it trains them; `check.npz` has the one batch of the check. The base and `weights.npz` are one model, with
    adapters where the cell has them.

    Arguments:
        name: The cell.
        folder: Made if missing.
        corpus: As `data.corpus`.
        num_users: U, users with enough text to fill every sequence.
        others: Further overrides of the experiment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = cell_config(name, folder, f"data.corpus={corpus}", *others)
    experiment = Experiment.open(config)
    store, wanted = experiment.store, SENTENCES * LENGTH + 1
    users = [int(user) for user in store.users("train") if store.num_tokens[user] >= wanted][:num_users]
    if len(users) < num_users:
        raise SystemExit(f"{corpus} has {len(users)} users of {wanted} tokens; ask for fewer devices")
    tokens = np.stack([store.tokens(user)[:wanted] for user in users])  # (U, n)
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "frequencies.npy", experiment.vocabulary.frequencies)
    np.savez(folder / "batches.npz", **_batches(tokens))  # type: ignore[arg-type]  # as in pfl_ours
    first = sequences(tokens[0, : BATCH * LENGTH + 1], LENGTH)
    np.savez(folder / "check.npz", inputs=first.inputs, targets=first.targets)
    model = build_model(config, experiment.vocabulary.frequencies, config.seed)
    save_base(config, weights(model), {})
    trainable = build_trainable(model, config)
    np.savez(folder / "weights.npz", **_all_weights(model))  # type: ignore[arg-type]
    return {"parameters": sum(a.size for a in _all_weights(model).values()), "trained": trainable.spec.size}


def _batches(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Return every user's sequences (U, sentences, T), inputs and targets, in the order of training."""
    parts: dict[str, list[np.ndarray]] = {"inputs": [], "targets": []}
    for device, stream_of_user in enumerate(tokens):
        order = stream(KEY, "shuffle", device)
        batches = list(local_batches(stream_of_user, length=LENGTH, batch_size=BATCH, epochs=1, generator=order))
        assert all(batch.mask.all() for batch in batches), "a sequence with padding"
        for name, of_users in parts.items():
            of_users.append(np.concatenate([getattr(batch, name) for batch in batches]))
    return {name: np.stack(of_users) for name, of_users in parts.items()}


def _all_weights(model: LanguageModel) -> dict[str, np.ndarray]:
    """Return body, adapters and tables by name."""
    assert model.output_bias is not None
    tables = {"input_table": model.input_table, "output_bias": model.output_bias}
    return {name: tensor.detach().numpy() for name, tensor in {**tables, **dict(model.named_parameters())}.items()}
