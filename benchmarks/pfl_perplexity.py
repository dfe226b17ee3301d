"""A different and cheaper method beside pfl's full training: held-out perplexity after as many device-rounds.

Both sides start from one base (trained centrally on a public share of the corpus) and train devices with real text, d
256, vocabulary 100,000: pfl all weights under the full softmax, fedlm LoRA and 10,000 embedding rows a round under NCE.
Central DP is off on both sides. Each side's learning rates come from a sweep of its own over fewer rounds; both are
chosen, and both are scored, on the same held-out users, exactly and over the whole vocabulary.

    python -m benchmarks.pfl_perplexity ubuntu_irc.users.jsonl.xz
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import machine
from benchmarks.pfl_cells import LENGTH
from benchmarks.pfl_environment import pfl_python
from benchmarks.pfl_ours import CHEAP, cell_config
from benchmarks.pfl_throughput import KEEP_MEMORY, ROOT
from fedlm.config.schema import Config
from fedlm.data.batching import evaluation_users, sequences
from fedlm.data.store import TokenStore
from fedlm.experiment import Experiment
from fedlm.pretraining.cache import has_base, load_base
from fedlm.pretraining.train import pretrain
from fedlm.randomness import seed_key, stream

CELL = "d256-100k"
PADDING = -100  # torch's cross-entropy leaves such targets out
# What a sweep of five rounds of 25 devices left of wider grids (pfl: also local 0.5, server 3e-4, both worse).
PFL_RATES = {"local": (0.1,), "server": (1e-3, 3e-3)}
OUR_RATES = {"local": (0.2, 0.5), "server": (3e-4, 1e-3)}
INITIAL_TOLERANCE = 1e-3
Train = Callable[[float, float, int], dict[str, float]]
Rates = dict[str, tuple[float, ...]]


def main() -> None:
    """Sweep and train both sides, and print perplexities and the rates chosen."""
    arguments = _parser().parse_args()
    arguments.corpus = str(Path(arguments.corpus).resolve())  # as runs store it: one corpus, one cached base
    config = base_config(arguments.corpus)
    experiment = Experiment.open(config)
    if not has_base(config):
        print("training the base", file=sys.stderr)
        pretrain(config, experiment.vocabulary, lambda event: None)
    python = arguments.pfl_python or pfl_python()
    result: dict[str, Any] = {"machine": machine(), "rounds": arguments.rounds, "cohort": arguments.cohort, "sides": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_shared(Path(folder), experiment, config, arguments.rounds * arguments.cohort)
        sides: dict[str, tuple[Train, Rates]] = {
            "pfl": (_pfl(python, Path(folder), arguments.cohort), PFL_RATES),
            "fedlm": (_fedlm(Path(folder), config, arguments), OUR_RATES),
        }
        for name, (train, rates) in sides.items():
            result["sides"][name] = sweep(name, train, rates, arguments)
    starts = [side["perplexity_initial"] for side in result["sides"].values()]
    if abs(starts[0] / starts[1] - 1) > INITIAL_TOLERANCE:
        raise SystemExit(f"perplexity before training is {starts}; the sides do not score the same model and text")
    print(json.dumps(result, indent=2) if arguments.json else _table(result))


def base_config(corpus: str) -> Config:
    """Return the experiment up to what trains: data, vocabulary, model, and a base from 5 % of the users."""
    public = ["data.public_fraction=0.05", "data.max_eval_tokens=10_000", "model.base='pretrain'"]
    return cell_config(CELL, Path(), f"data.corpus={corpus}", *public, cheap=True)


def write_shared(folder: Path, experiment: Experiment, config: Config, num_devices: int) -> None:
    """Write what pfl's side reads: the base's weights, `num_devices` users drawn at random, the held-out users."""
    np.savez(folder / "weights.npz", **load_base(config))  # type: ignore[arg-type]  # as in pfl_ours
    store, key = experiment.store, seed_key(config.seed)
    train = stream(key, "benchmark/users").permutation(store.users("train"))
    train = train[store.num_tokens[train] > 1]
    if len(train) < num_devices:
        raise SystemExit(f"{len(train)} users train, the comparison wants {num_devices}; lower --rounds or --cohort")
    write_users(folder / "train.npz", store, train[:num_devices])
    held_out = evaluation_users(store, config.data.max_eval_tokens, stream(key, "evaluation"))
    write_users(folder / "eval.npz", store, held_out)


def write_users(file: Path, store: TokenStore, users: np.ndarray) -> None:
    """Write the sequences of some users, (N, T), and where each user's begin."""
    parts = [sequences(store.tokens(int(user)), LENGTH) for user in users]
    np.savez(
        file,
        inputs=np.concatenate([part.inputs for part in parts]),
        targets=np.concatenate([np.where(part.mask, part.targets, PADDING) for part in parts]),
        offsets=np.cumsum([0, *(len(part.inputs) for part in parts)]),
    )


def sweep(name: str, train: Train, rates: Rates, arguments: argparse.Namespace) -> dict[str, Any]:
    """Try every pair of rates over a few rounds and return the whole run with the best."""
    tried = []
    for local, server in product(rates["local"], rates["server"]):
        found = train(local, server, arguments.sweep_rounds)["perplexity"]
        print(f"{name}: local {local}, server {server}: {found:.1f}", file=sys.stderr)
        tried.append({"local": local, "server": server, "perplexity": found})
    best = min(tried, key=lambda one: one["perplexity"])
    return {"sweep": tried, "local": best["local"], "server": best["server"]} | train(
        best["local"], best["server"], arguments.rounds
    )


def _pfl(python: Path, folder: Path, cohort: int) -> Train:
    def train(local: float, server: float, rounds: int) -> dict[str, float]:
        options = {"folder": folder, "cell": CELL, "rounds": rounds, "cohort": cohort,
                   "local-rate": local, "server-rate": server}  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return _json([str(python), "-W", "ignore", "-m", "benchmarks.pfl_peer_rounds", *words])

    return train


def _fedlm(folder: Path, config: Config, arguments: argparse.Namespace) -> Train:
    def train(local: float, server: float, rounds: int) -> dict[str, float]:
        overrides = [
            f"vocabulary.size={config.vocabulary.size}", f"data.corpus={arguments.corpus}",
            f"data.sequence_length={LENGTH}", f"data.public_fraction={config.data.public_fraction}",
            f"data.max_eval_tokens={config.data.max_eval_tokens}", f"model.d_model={config.model.d_model}",
            f"model.d_ff={config.model.d_ff}", f"model.num_layers={config.model.num_layers}",
            f"model.num_heads={config.model.num_heads}", *CHEAP, f"local.learning_rate={local}",
            f"strategy.learning_rate={server}", f"rounds={rounds}", f"fleet.cohort={arguments.cohort}",
            "privacy.enabled=false", "execution.grid='inprocess'", "execution.eval_every=0",
        ]  # fmt: skip
        sets = [word for text in overrides for word in ("--set", text)]
        out = folder / f"run-{local}-{server}-{rounds}"
        found = _json([sys.executable, "-m", "fedlm.cli", "simulate", *sets, "--out", str(out), "--json"])
        kept = ("perplexity_initial", "perplexity", "devices_trained", "bytes_up_per_device")
        return {name: found[name] for name in kept}

    return train


def _json(command: list[str]) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | KEEP_MEMORY
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _table(result: dict[str, Any]) -> str:
    devices = result["rounds"] * result["cohort"]
    lines = [
        f"{result['rounds']} rounds of {result['cohort']} devices ({devices:,} device-rounds), FedAdam, no central DP,",
        "local epoch 1, batch 16, d 256, vocabulary 100,000; pfl trains everything, fedlm LoRA and 10,000 rows a round",
        f"{'':8}{'local rate':>11}{'server rate':>12}{'before':>9}{'after':>9}{'of pairs':>10}",
    ]
    for name, side in result["sides"].items():
        lines.append(
            f"{name:8}{side['local']:11}{side['server']:12}{side['perplexity_initial']:9.1f}{side['perplexity']:9.1f}"
            f"{len(side['sweep']):10}"
        )
    return "\n".join([*lines, result["machine"]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="a users.jsonl[.xz] file")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sweep-rounds", type=int, default=5)
    parser.add_argument("--cohort", type=int, default=25, help="devices a round; fedlm samples that many on average")
    parser.add_argument("--pfl-python", type=Path, help="an interpreter with pfl 0.6; default: one in the cache folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    main()
