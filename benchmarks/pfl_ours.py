"""fedlm's side of the comparison with pfl: the same batches through what a simulation's worker does."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.matmul_rate import COMPUTE, Worker
from benchmarks.measure import status_mb
from benchmarks.pfl_cells import BATCH, CELLS, CLIP_NORM, LEARNING_RATE, LENGTH
from fedlm.config.load import load_config
from fedlm.config.schema import Config
from fedlm.models.factory import empty_model
from fedlm.models.weights import set_weights
from fedlm.pretraining.cache import load_base
from fedlm.trainable.build import build_trainable

CHEAP = ["loss.kind='nce'", "loss.negatives=512", "trainable.lora.rank=8", "trainable.embedding_rows.count=10_000"]


def cell_config(name: str, folder: Path, *others: str, cheap: bool = False) -> Config:
    """Return fedlm's experiment for a cell.

    Arguments:
        name: The cell.
        folder: Holds the base.
        others: Further overrides.
        cheap: NCE, 10,000 embedding rows and LoRA instead of what pfl trains.
    """
    cell = CELLS[name]
    same = ["loss.kind='full_softmax'", f"trainable.lora.rank={cell.rank}"]
    if cell.rank:
        same.append("trainable.embedding_rows.count=0")
    else:
        rows = ["trainable.embedding_rows.sampler='top_k'", f"trainable.embedding_rows.count={cell.vocabulary}"]
        same += ["trainable.dense=['*']", *rows]
    overrides = [
        f"vocabulary.size={cell.vocabulary}", f"model.d_model={cell.d_model}", f"model.d_ff={cell.d_ff}",
        f"model.num_layers={cell.num_layers}", f"model.num_heads={cell.num_heads}", f"model.base={folder / 'base'}",
        f"data.sequence_length={LENGTH}", f"local.batch_size={BATCH}", f"local.learning_rate={LEARNING_RATE}",
        f"local.row_learning_rate={LEARNING_RATE}", f"privacy.clip_norm={CLIP_NORM}",
    ]  # fmt: skip
    return load_config(None, [*overrides, *(CHEAP if cheap else same), *others])


def worker(folder: Path, config: Config) -> Worker:
    """Return a simulation's worker with the weights that both sides start from."""
    model = empty_model(config, config.vocabulary.size)
    set_weights(model, load_base(config))
    return Worker(config, np.load(folder / "frequencies.npy"), build_trainable(model, config))


def measure(side: Worker, tokens: list[np.ndarray], devices: int) -> dict[str, float]:
    """Warm the heap with two users, then time a cohort."""
    side.cohort(tokens[:2], [0, 1], grouped=True)
    started = time.process_time()
    side.cohort(tokens[2 : 2 + devices], range(2, 2 + devices), grouped=True)
    return {"devices_per_cpu_s": devices / (time.process_time() - started), "peak_mb": status_mb("VmHWM")}


def one_batch(side: Worker, tokens: list[np.ndarray], out: Path) -> dict[str, float]:
    """Train the first user's first batch at learning rate 1 and store the update, minus the gradient, by name."""
    update, loss = side.update(tokens[0][: BATCH * LENGTH + 1], 0)
    np.savez(out, **side.spec.views(update))
    return {"loss": loss}


def main() -> None:
    """Measure one row in this process, which does nothing else, or train the batch of the check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cell", choices=CELLS, required=True)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--route", choices=COMPUTE, default="fp32")
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--check", type=Path, help="train one batch and store its update here")
    parser.add_argument("--cheap", action="store_true", help="NCE, embedding rows and LoRA")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    baseline_mb = status_mb("VmRSS")
    rate = ["local.learning_rate=1", "local.row_learning_rate=1"] if arguments.check else []
    overrides = [f"model.dropout={arguments.dropout}", f"execution.products='{COMPUTE[arguments.route]}'", *rate]
    config = cell_config(arguments.cell, arguments.folder, *overrides, cheap=arguments.cheap)
    side, tokens = worker(arguments.folder, config), list(np.load(arguments.folder / "tokens.npy"))
    if arguments.check:
        print(json.dumps(one_batch(side, tokens, arguments.check)))
    else:
        print(json.dumps(measure(side, tokens, arguments.devices) | {"baseline_mb": baseline_mb}))


if __name__ == "__main__":
    main()
