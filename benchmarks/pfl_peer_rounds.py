"""pfl's side of the perplexity comparison: federated rounds of full training, central DP off, exact evaluation."""

from __future__ import annotations

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pfl.internal.ops import pytorch_ops  # type: ignore[import-not-found]  # noqa: F401  # registers PyTorch
from pfl.stats import MappedVectorStatistics  # type: ignore[import-not-found]
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.pfl_cells import CELLS
from benchmarks.pfl_model import Transformer
from benchmarks.pfl_peer import Side, load

BETAS, EPSILON = (0.9, 0.99), 1e-4  # as fedlm's FedAdam
SEQUENCES_AT_ONCE = 16


def main() -> None:
    """Train from the shared weights and print perplexity before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cell", choices=CELLS, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--cohort", type=int, required=True)
    parser.add_argument("--local-rate", type=float, required=True)
    parser.add_argument("--server-rate", type=float, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network = load(arguments.folder, arguments.cell, 0.0)
    users, held_out = (read_users(arguments.folder / f"{part}.npz") for part in ("train", "eval"))
    central = partial(torch.optim.Adam, lr=arguments.server_rate, betas=BETAS, eps=EPSILON)
    side = Side(network, users, central, mechanism=None)
    found: dict[str, Any] = {"perplexity_initial": perplexity(network, held_out)}
    for _ in range(arguments.rounds):
        total: MappedVectorStatistics = side.gather(arguments.cohort, arguments.local_rate)
        total.average()
        side.model.apply_model_update(total)
    found["perplexity"] = perplexity(network, held_out)
    print(json.dumps(found))


def read_users(file: Path) -> list[tuple[Tensor, Tensor]]:
    """Return each user's inputs and targets, (sequences, T) both."""
    with np.load(file) as arrays:
        inputs, targets = (torch.from_numpy(arrays[name]) for name in ("inputs", "targets"))  # (N, T)
        sizes = np.diff(arrays["offsets"]).tolist()
    return list(zip(torch.split(inputs, sizes), torch.split(targets, sizes), strict=True))


@torch.no_grad()
def perplexity(network: Transformer, users: list[tuple[Tensor, Tensor]]) -> float:
    """Return the exact full-softmax perplexity over all real tokens."""
    network.eval()
    inputs, targets = (torch.cat(parts) for parts in zip(*users, strict=True))  # (N, T)
    total = 0.0
    for x, y in zip(*(torch.split(part, SEQUENCES_AT_ONCE) for part in (inputs, targets)), strict=True):
        total += cross_entropy(network.logits(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    mean = total / int((targets >= 0).sum())
    return math.exp(mean) if mean < 700 else math.inf


if __name__ == "__main__":
    main()
