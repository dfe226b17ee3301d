"""A run folder as the engine writes one, with figures of a realistic shape; a helper of the tests here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG = """seed = 1
rounds = 30

[data]
corpus = "chitchat"

[trainable.lora]
rank = 8
targets = ["attention", "mlp"]

[local]
learning_rate = 0.5

[privacy]
clip_norm = 0.3
epsilon = 2.0
delta = 1e-6
population = 1000000
"""
STATEMENT = (
    "User-level differential privacy with epsilon 1.975 at delta 1e-06 (unit: user (all data of one device); "
    "adjacency: add or remove one user) for all 30 releases together: Poisson sampling at "
    "q = 5,000 / 1,000,000 = 0.005, Gaussian mechanism with noise multiplier z = 0.72, clip norm C = 0.3, "
    "PLD accounting. It holds against those who see only the releases; the seed decides the cohorts and must "
    "stay secret."
)
STAMP = (
    "no guarantee for this model: epsilon 1.975 is that of 5,000 of 1,000,000 users a round; "
    "the simulated 100 of 5,981 got epsilon 83.13"
)
UP, DOWN = 2_310_144, 2_404_352


def write_run(
    folder: Path,
    *,
    rounds: int = 30,
    eval_every: int = 5,
    private: bool = True,
    stamps: tuple[str, ...] = (STAMP,),
    config: str = CONFIG,
    start: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run folder and return it; `start` replaces keys of the ledger's start event."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(config, encoding="utf-8")
    metrics = [_metrics(i, rounds, eval_every, private) for i in range(rounds + 1)]
    (folder / "metrics.jsonl").write_text(_lines(metrics))
    events = [_start(private, stamps) | dict(start or {}), *(_round(i) for i in range(1, rounds + 1))]
    end = {
        "event": "end",
        "status": "finished",
        "round": rounds,
        "peak_device_mb": 148.3,
        "seconds": 6.9 * rounds + 18.0,
    }
    seen = {"separation": 3, "max_participations": 7, "epsilon_realised": 1.9}
    events.append(end | (seen if private and rounds else {}))
    (folder / "ledger.jsonl").write_text(_lines(events))
    return folder


def trained(i: int) -> int:
    """Return how many devices trained in a round."""
    return 96 + (i * 37) % 11


def failed(i: int) -> dict[str, int]:
    """Return how many devices failed in a round, by cause."""
    return {"not enough memory": 1} | ({"dropped out": 2} if i % 3 == 0 else {})


def sampled(i: int) -> int:
    """Return how many devices a round sampled; all of them are metered."""
    return trained(i) + sum(failed(i).values())


def _metrics(i: int, rounds: int, eval_every: int, private: bool) -> dict[str, Any]:
    evaluated = i in {0, rounds} or (eval_every and i % eval_every == 0)
    perplexity = 228.0 + 184.3 * math.exp(-i / 9.0) if evaluated else None
    wobble = 1 + 0.06 * math.sin(2.3 * i)
    training = {
        "update_norm": 0.011 * wobble + 0.02,
        "non_private": {
            "train_loss": 4.9 - 0.02 * i,
            "client_norm_median": (0.24 + 0.12 * math.exp(-i / 12)) * wobble,
            "client_norm_p90": (0.41 + 0.25 * math.exp(-i / 12)) * wobble,
            "clip_fraction": 0.31 + 0.4 * math.exp(-i / 10) * wobble,
        },
    }
    devices = sum(sampled(j) for j in range(1, i + 1))
    return {
        "round": i,
        "seconds": 14.0 + 6.9 * i,
        "round_seconds": 5.8 if i else 0.0,
        "devices": trained(i) if i else 0,
        "epsilon": 0.0 if i == 0 else 0.55 + 0.26 * math.sqrt(i) if private else None,
        "megabytes_up": devices * UP / 1e6,
        "megabytes_down": devices * DOWN / 1e6,
        "perplexity": perplexity,
        "bits_per_byte": math.log2(perplexity) / 5.42 if perplexity else None,
        "log_z_mean": 0.08 * math.cos(i),
        "log_z_std": 0.31,
    } | (training if i else {"update_norm": None, "non_private": None})


def _start(private: bool, stamps: tuple[str, ...]) -> dict[str, Any]:
    blocks = [
        {"kind": kind, "name": f"blocks.{layer}.{kind}", "bytes": size}
        for layer in range(3)
        for kind, size in (("lora_a", 4 * 8 * 1344), ("lora_b", 4 * 8 * 1152))
    ]
    blocks.append({"kind": "rows", "name": "embedding", "bytes": 4 * 3000 * 192 - 2000})
    blocks.append({"kind": "bias", "name": "ln.bias", "bytes": 1536})
    return {
        "event": "start",
        "time": "2026-02-11T09:30:12Z",
        "versions": {
            "fedlm": "0.1.0",
            "torch": "2.13.0",
            "flwr": "1.41.0",
            "ray": "2.55.1",
            "python": "3.11.9",
        },
        "machine": "2 cores, 8 GB, Linux",
        "config_hash": "9b1c7e02",
        "clip_norm": 0.3,
        "blocks": blocks,
        "privacy": {
            "privacy_statement": STATEMENT if private else "NOT PRIVATE: privacy.enabled is false.",
            "stamps": list(stamps),
            "enabled": private,
            "unit": "user (all data of one device)",
            "adjacency": "add or remove one user",
            "sampler": "poisson",
            "mechanism": "gaussian",
            "accountant": "pld",
            "epsilon": 1.97407 if private else None,
            "epsilon_of_this_fleet": 83.12345 if private else None,
            "epsilon_target": 2.0,
            "delta": 1e-6,
            "noise_multiplier": 0.72,
            "clip_norm": 0.3 if private else None,
            "rounds": 30,
            "sampling_probability": 0.005,
            "population": 1_000_000,
            "expected_cohort": 5_000,
            "fleet_size": 5_981,
            "cohort": 100,
            "reproducible_noise": False,
        },
    }


def _round(i: int) -> dict[str, Any]:
    return {
        "event": "round",
        "round": i,
        "sampled": sampled(i),
        "trained": trained(i),
        "failed": failed(i),
        "bytes_up": sampled(i) * UP,
        "bytes_down": sampled(i) * DOWN,
        "uploaded": sampled(i),
        "downloaded": sampled(i),
        "seconds": 5.8,
    }


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
