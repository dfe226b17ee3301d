"""How much of this processor's matrix-multiply rate local training reaches, and what training in groups gives.

One thread. The peak is the best of several shapes on each backend to a product: torch's default, oneDNN
(`set_float32_matmul_precision("medium")`, which some processors round to bf16) and bf16 tensors. Training counts the
floating-point operations of the products that training one device at a time needs, whatever a group spends on padding.
Both ways take turns on the same devices in one process for each case; times are of the processor.

    python -m benchmarks.matmul_rate ubuntu_irc.users.jsonl.xz
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import machine
from fedlm.config.load import load_config
from fedlm.config.schema import Config
from fedlm.experiment import Experiment
from fedlm.models.factory import build_model
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.clipping.clipped_sum import new_sum
from fedlm.randomness import round_key
from fedlm.trainable.build import build_trainable
from fedlm.trainable.parts import dense
from fedlm.trainable.rows import row_set
from fedlm.training import matmul_backend
from fedlm.training.grouped.trainer import GroupTrainer, why_not_grouped
from fedlm.training.local import LocalTrainer
from simulations.grids.ray_session import WORKER_ENVIRONMENT

KEY = round_key(1, 1)
SQUARE = [(1024, 1024, 1024), (2048, 2048, 2048)]
TALL = [(512, 256, 1024), (8192, 256, 768), (8192, 256, 1024), (8192, 1024, 256), (512, 256, 512)]  # rows are tokens
COMPUTE = {"fp32": "auto", "bf16": "bf16"}  # values of execution.products
PRODUCT_S = 0.3  # processor time spent on each product


@dataclass(frozen=True)
class Case:
    """Devices of one kind; the model has V 100,000, 4 layers, LoRA rank 8, NCE with 512 negatives.

    Arguments:
        what: A line for the table.
        batches: Full batches of each device; 0: real devices with the corpus's median amount of text.
        length: Tokens in a sequence.
        d_model: Width.
        rows: Embedding rows that train.
    """

    what: str
    batches: int
    length: int
    d_model: int = 256
    rows: int = 0


CASES = {
    "rate": Case("2 batches of 16 x 32", 2, 32),
    "full": Case("2 batches of 16 x 16", 2, 16),
    "full-rows": Case("2 batches of 16 x 16, 10,000 rows", 2, 16, rows=10_000),
    "full-small": Case("2 batches of 16 x 16, d 96", 2, 16, d_model=96),
    "median": Case("median text", 0, 32),
    "median-rows": Case("median text, 10,000 rows", 0, 32, rows=10_000),
    "median-small": Case("median text, d 96", 0, 32, d_model=96),
}


class Worker:
    """What a simulation's worker keeps, with both ways to train.

    Arguments:
        config: The experiment.
        frequencies: Public word frequencies (V,).
        trainable: The model and what trains in it.
    """

    def __init__(self, config: Config, frequencies: np.ndarray, trainable: Any) -> None:
        blocks = trainable.initial_blocks(copy_tables=True)
        trainable.bind_tables(blocks)
        rows = row_set(config.trainable.embedding_rows, frequencies, seed=config.seed, round_number=1)
        self.spec = trainable.spec.with_rows(rows)
        self._clip_spec = ClipSpec(config.privacy.clip_norm)
        backend = config.execution.products
        matmul_backend.use(matmul_backend.choose() if backend == "auto" else backend)
        self.local = LocalTrainer(trainable, config, frequencies)
        self.local.start_round(self.spec, blocks)
        is_grouped = not why_not_grouped(trainable, config)
        self.groups = GroupTrainer(trainable, config, frequencies) if is_grouped else None
        if self.groups is not None:
            self.groups.start_round(self.spec, blocks)

    def cohort(self, tokens: Sequence[np.ndarray], devices: Sequence[int], *, grouped: bool) -> None:
        """Train, clip each device and sum; in groups where they are asked for and the model allows it."""
        total = new_sum(self._clip_spec, self.spec.size)
        if self.groups is None or not grouped:
            for text, device in zip(tokens, devices, strict=True):
                total.add(self.local.train(text, key=KEY, device=device).update)
            return
        size = self.groups.largest_group
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            for result in self.groups.train(tokens[part], key=KEY, devices=devices[part]):
                total.add_parts(result.parts)

    def update(self, text: np.ndarray, device: int) -> tuple[np.ndarray, float]:
        """Return one device's update (P,) and loss, from the program that `cohort` runs."""
        if self.groups is None:
            result = self.local.train(text, key=KEY, device=device)
            return result.update, result.loss
        (member,) = self.groups.train([text], key=KEY, devices=[device])
        return dense(member.parts, self.spec.size), member.loss


def main() -> None:
    """Measure the peaks, then every case in a process of its own."""
    arguments = _parser().parse_args()
    torch.set_num_threads(1)
    if arguments.case:
        print(json.dumps(measure(CASES[arguments.case], arguments)))
        return
    result: dict[str, Any] = {"machine": machine(), "group_size": arguments.group_size}
    result["peaks"] = peaks()
    result["cases"] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), arguments.corpus, arguments.devices)
        for name in arguments.cases:
            print(name, file=sys.stderr)
            result["cases"][name] = _in_fresh_process(name, folder, arguments)
    print(json.dumps(result, indent=2) if arguments.json else _table(result))


def peaks() -> dict[str, dict[str, float]]:
    """Return GFLOP/s of each backend and shape."""
    found = {}
    for backend, precision, kind in (
        ("fp32", "highest", torch.float32),
        ("onednn", "medium", torch.float32),
        ("bf16", "highest", torch.bfloat16),
    ):
        torch.set_float32_matmul_precision(precision)
        found[backend] = {"x".join(map(str, shape)): product_rate(shape, kind) for shape in SQUARE + TALL}
    torch.set_float32_matmul_precision("highest")
    return found


def product_rate(shape: tuple[int, int, int], kind: torch.dtype) -> float:
    """Return the GFLOP/s of (m, k) @ (k, n) in one thread, the best of repeated products."""
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator).to(kind) for size in ((m, k), (k, n)))
    out = torch.empty(m, n, dtype=kind)
    best, spent = float("inf"), 0.0
    while spent < PRODUCT_S:
        seconds = _seconds(partial(torch.mm, a, b, out=out))
        best, spent = min(best, seconds), spent + seconds
    return 2e-9 * m * k * n / best


def prepare(folder: Path, corpus: str, num_devices: int) -> None:
    """Write the median devices' text, one device's worth of full batches, and public frequencies."""
    experiment = Experiment.open(case_config(CASES["rate"], f"data.corpus={corpus}"))
    store = experiment.store
    train = store.users("train")
    num_tokens = store.num_tokens[train]
    nearest = train[np.argsort(np.abs(num_tokens - np.median(num_tokens)), kind="stable")[:num_devices]]
    texts = [store.tokens(int(user)) for user in nearest]
    np.savez(folder / "median.npz", tokens=np.concatenate(texts), sizes=[len(text) for text in texts])
    longest = train[np.argsort(-num_tokens, kind="stable")]
    np.save(folder / "long.npy", np.concatenate([store.tokens(int(user)) for user in longest[: 4 * num_devices]]))
    np.save(folder / "frequencies.npy", experiment.vocabulary.frequencies)


def case_config(case: Case, *others: str) -> Config:
    """Return the experiment of a case."""
    overrides = [
        "vocabulary.size=100_000", f"model.d_model={case.d_model}", "model.num_layers=4",
        f"data.sequence_length={case.length}", "local.batch_size=16", "trainable.lora.rank=8", "loss.kind='nce'",
        f"trainable.embedding_rows.count={case.rows}",
    ]  # fmt: skip
    return load_config(None, [*overrides, *others])


def case_tokens(case: Case, folder: Path, num_devices: int) -> list[np.ndarray]:
    """Return the devices' token streams."""
    if case.batches:
        size = case.batches * 16 * case.length + 1
        text = np.load(folder / "long.npy")
        return [text[device * size : (device + 1) * size] for device in range(num_devices)]
    with np.load(folder / "median.npz") as arrays:
        return np.split(arrays["tokens"], np.cumsum(arrays["sizes"])[:-1])


def measure(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train the case's devices both ways in turn; in this process, which does nothing else."""
    folder = Path(arguments.folder)
    frequencies, tokens = np.load(folder / "frequencies.npy"), case_tokens(case, folder, arguments.devices)
    devices = list(range(len(tokens)))
    found: dict[str, Any] = {"devices": len(tokens), "tokens": sum(map(len, tokens)) / len(tokens)}
    for compute, backend in COMPUTE.items():
        groups = f"execution.group_size={arguments.group_size}"
        config = case_config(case, groups, f"execution.products='{backend}'")
        model = build_model(config, frequencies, config.seed)
        worker = Worker(config, frequencies, build_trainable(model, config))
        with FlopCounterMode(display=False) as counter:
            worker.cohort(tokens[:1], devices[:1], grouped=False)  # also warms the heap
        gflop = counter.get_total_flops() / 1e9 if case.batches else 0.0
        worker.cohort(tokens, devices, grouped=True)
        times: dict[str, list[float]] = {"one by one": [], "groups": []}
        for _ in range(arguments.repeats):
            for way, of_way in times.items():
                of_way.append(_seconds(partial(worker.cohort, tokens, devices, grouped=way == "groups")))
        rates = {way: len(tokens) / median(of_way) for way, of_way in times.items()}
        found[compute] = {"gflop_per_device": gflop, "devices_per_cpu_s": rates}
    return found


def _seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def _in_fresh_process(name: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    numbers = {"devices": arguments.devices, "repeats": arguments.repeats, "group-size": arguments.group_size}
    options = [word for option, value in numbers.items() for word in (f"--{option}", str(value))]
    command = [sys.executable, "-m", "benchmarks.matmul_rate", arguments.corpus, "--case", name, "--folder", folder]
    environment = os.environ | WORKER_ENVIRONMENT
    done = subprocess.run([*command, *options], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _table(result: dict[str, Any]) -> str:
    best = {backend: max(shapes.values()) for backend, shapes in result["peaks"].items()}
    shapes = list(next(iter(result["peaks"].values())))
    lines = ["Products, GFLOP/s, one thread", f"{'':8}" + "".join(f"{shape:>15}" for shape in shapes)]
    for backend, of_backend in result["peaks"].items():
        lines.append(f"{backend:8}" + "".join(f"{rate:15.0f}" for rate in of_backend.values()))
    lines += [
        "",
        f"Training, NCE and LoRA rank 8, vocabulary 100,000, 4 layers, groups of {result['group_size']}, one thread",
        f"{'':36}{'compute':>8}{'devices/CPU s':>15}{'groups':>9}{'ratio':>7}{'GFLOP/s':>9}{'groups':>8}{'of best':>9}",
    ]
    for name, case in result["cases"].items():
        for compute in COMPUTE:
            lines.append(f"{CASES[name].what:36}{compute:>8}" + _rates(case[compute], _peak(best, compute)))
    return "\n".join([*lines, result["machine"]])


def _peak(best: dict[str, float], compute: str) -> float:
    """Return the rate to compare with: the best backend that keeps fp32, or that of bf16."""
    return best["bf16"] if compute == "bf16" else max(best["fp32"], best["onednn"])


def _rates(found: dict[str, Any], peak: float) -> str:
    single, grouped = (found["devices_per_cpu_s"][way] for way in ("one by one", "groups"))
    text = f"{single:15.1f}{grouped:9.1f}{grouped / single:7.2f}"
    if gflop := found["gflop_per_device"]:
        text += f"{single * gflop:9.0f}{grouped * gflop:8.0f}{grouped * gflop / peak:8.0%} "
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="a users.jsonl[.xz] file")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--devices", type=int, default=32, help="of each case")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
