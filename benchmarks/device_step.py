"""What one local step costs a device, by loss and by what trains: peak memory and time.

Every variant runs in a fresh process with one thread, on the same text and the same base, and takes the product's own
path: the base is mapped from its file, the patches of earlier rounds are applied, `LocalTrainer` trains, the update is
clipped. One variant is the full training written out in ordinary PyTorch, so that we are not compared with our own code
alone. As a small device should, processes give blocks of 1 MiB and more back to the system at once (glibc's
MALLOC_MMAP_THRESHOLD_, unless it is set). Times are processor time, so that a busy machine distorts them little.

    python -m benchmarks.device_step
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, embedding

from benchmarks.measure import machine, reset_peak, status_mb
from fedlm.config.load import load_config
from fedlm.config.schema import Config
from fedlm.data.batching import local_batches
from fedlm.data.vocabulary_source import load_vocabulary
from fedlm.experiment import Experiment
from fedlm.models.base import LanguageModel
from fedlm.models.factory import build_model, empty_model
from fedlm.models.weights import set_weights, weights
from fedlm.pretraining.cache import WEIGHTS, load_base, save_base
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.clipping.clipped_sum import new_sum
from fedlm.randomness import round_key, stream
from fedlm.trainable.build import build_trainable
from fedlm.trainable.rows import row_set
from fedlm.trainable.spec import UpdateSpec
from fedlm.training.local import LocalTrainer

BATCH, LENGTH = 16, 32
REFERENCE = "full softmax, all weights"
PLAIN = "the same in plain PyTorch"
TARGET = "NCE, LoRA, rows"
_LORA = ["trainable.lora.rank=8"]
_ROWS, _NO_ROWS = ["trainable.embedding_rows.count={some}"], ["trainable.embedding_rows.count=0"]
_ALL = [
    "loss.kind='full_softmax'", "trainable.lora.rank=0", "trainable.dense=['*']",
    "trainable.embedding_rows.sampler='top_k'", "trainable.embedding_rows.count={all}",
]  # fmt: skip
VARIANTS = {
    REFERENCE: _ALL,
    PLAIN: _ALL,
    "full softmax, LoRA": ["loss.kind='full_softmax'", *_LORA, *_NO_ROWS],
    "sampled softmax, LoRA, rows": ["loss.kind='sampled_softmax'", *_LORA, *_ROWS],
    TARGET: ["loss.kind='nce'", *_LORA, *_ROWS],
    "NCE, LoRA": ["loss.kind='nce'", *_LORA, *_NO_ROWS],
}
KEY = round_key(1, 2)


def main() -> None:
    """Measure every variant in interleaved repetitions and print medians."""
    arguments = _parser().parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments)))
        return
    result: dict[str, Any] = {"machine": machine(), "vocabulary": arguments.vocabulary, "variants": {}}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), arguments.vocabulary)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
        for repeat in range(arguments.repeats):
            for name in VARIANTS:
                print(f"repetition {repeat + 1}: {name}", file=sys.stderr)
                runs[name].append(_in_fresh_process(name, folder, arguments))
    for name, of_name in runs.items():
        result["variants"][name] = {field: median(run[field] for run in of_name) for field in of_name[0]}
    print(json.dumps(result, indent=2) if arguments.json else _table(result))


def prepare(folder: Path, vocabulary_size: int) -> None:
    """Write what all variants share: a base, public frequencies, and one full batch of a real user's chat."""
    config = variant_config(TARGET, folder, vocabulary_size)
    vocabulary = load_vocabulary(config)
    np.save(folder / "frequencies.npy", vocabulary.frequencies)
    save_base(config, weights(build_model(config, vocabulary.frequencies, config.seed)), {})
    store = Experiment.open(config).store
    wanted = BATCH * LENGTH + 1
    user = next(int(u) for u in store.users("train") if store.num_tokens[u] >= wanted)
    np.save(folder / "tokens.npy", store.tokens(user)[:wanted])


def variant_config(name: str, folder: Path, vocabulary_size: int, *others: str) -> Config:
    """Return the experiment of one variant; `others` are further overrides."""
    counts = {"all": vocabulary_size, "some": min(10_000, vocabulary_size)}
    overrides = [
        "model.d_model=256", "model.num_layers=4", f"model.base={folder / 'base'}",
        f"vocabulary.size={vocabulary_size}", f"data.sequence_length={LENGTH}", f"local.batch_size={BATCH}",
    ]  # fmt: skip
    return load_config(None, [*overrides, *(text.format(**counts) for text in VARIANTS[name]), *others])


def measure(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure one variant in this process, which does nothing else."""
    torch.set_num_threads(1)
    folder, vocabulary_size = Path(arguments.folder), arguments.vocabulary
    tokens, frequencies = np.load(folder / "tokens.npy"), np.load(folder / "frequencies.npy")
    config = variant_config(name, folder, vocabulary_size)
    new_device = PlainDevice if name == PLAIN else Device
    _warm_up(partial(variant_config, name, folder), new_device)
    gc.collect()
    reset_peak()
    baseline_mb, baseline_file_mb = status_mb("VmRSS"), status_mb("RssFile")
    model = empty_model(config, vocabulary_size)
    set_weights(model, load_base(config))
    device = new_device(model, config, frequencies, arguments.patches)
    update = device.step(tokens)
    found = {"baseline_mb": baseline_mb, "update_mb": update.nbytes / 1e6, "peak_mb": status_mb("VmHWM") - baseline_mb}
    found["file_mb"] = status_mb("RssFile") - baseline_file_mb
    device.clip(update)
    found["clipped_peak_mb"] = status_mb("VmHWM") - baseline_mb
    del update
    return found | {"step_ms": 1e3 * median(_seconds(device, tokens) for _ in range(arguments.steps))}


def _warm_up(config: Callable[..., Config], new_device: type[Device]) -> None:
    """Run one step of a tiny model: first calls import and compile code, whatever the model's size."""
    size = 64
    tiny = config(size, "model.d_model=16", "model.num_layers=1", "loss.negatives=16")
    frequencies = np.full(size, 1 / size)
    device = new_device(build_model(tiny, frequencies, 1), tiny, frequencies, 1)
    device.clip(device.step(np.arange(BATCH * LENGTH + 1, dtype=np.int32) % size))


def _seconds(device: Device, tokens: np.ndarray) -> float:
    started = time.process_time()
    device.step(tokens)
    return time.process_time() - started


class Device:
    """What `clients.host.DeviceHost` keeps and does, for one device.

    Arguments:
        model: Mapped from the base's file.
        config: The variant.
        frequencies: Public word frequencies (V,).
        num_patches: Rounds before this one, whose changes the device has received.
    """

    def __init__(self, model: LanguageModel, config: Config, frequencies: np.ndarray, num_patches: int) -> None:
        rows = partial(row_set, config.trainable.embedding_rows, frequencies, seed=config.seed)
        trainable = build_trainable(model, config)
        blocks = trainable.initial_blocks(copy_tables=False)
        trainable.bind_tables(blocks)
        for t in range(1, num_patches + 1):
            _receive_patch(trainable.spec.with_rows(rows(round_number=t)), blocks)
        self._trainer = LocalTrainer(trainable, config, frequencies)
        self._trainer.start_round(trainable.spec.with_rows(rows(round_number=num_patches + 1)), blocks)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Train on one batch and return the update (P,)."""
        return self._trainer.train(tokens, key=KEY, device=0).update

    def clip(self, update: np.ndarray) -> None:
        """Clip the update into a sum of one device: what a device sends."""
        new_sum(ClipSpec(0.3), len(update)).add(update)


def _receive_patch(spec: UpdateSpec, blocks: dict[str, np.ndarray]) -> None:
    """Write what the server sends after a round: new values of all that trains, of the tables only its rows."""
    patch = np.random.default_rng(0).standard_normal(spec.size, np.float32) * np.float32(0.01)
    spec.scatter_blocks(blocks, patch)


class PlainDevice(Device):
    """The full training in ordinary PyTorch: every weight a parameter, all scores at once, torch's own SGD."""

    def __init__(self, model: LanguageModel, config: Config, frequencies: np.ndarray, num_patches: int) -> None:
        assert model.output_bias is not None
        self._model, self._config = model, config
        self._table, self._bias = nn.Parameter(model.input_table), nn.Parameter(model.output_bias)
        self._parameters = [self._table, self._bias, *(p.requires_grad_(True) for p in model.parameters())]
        self._optimiser = torch.optim.SGD(self._parameters, lr=config.local.row_learning_rate)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Train on one batch in place; the update is left to whoever keeps the old weights."""
        (batch,) = local_batches(tokens, length=LENGTH, batch_size=BATCH, epochs=1, generator=stream(KEY, "shuffle", 0))
        rows = embedding(torch.from_numpy(batch.inputs), self._table)  # (B, T, D)
        hidden = self._model.body(self._model.embed(rows)).flatten(0, 1)  # (N, D)
        scores = hidden @ self._table.T + self._bias  # (N, V)
        self._optimiser.zero_grad()
        cross_entropy(scores, torch.from_numpy(batch.targets).flatten()).backward()
        self._optimiser.step()
        return np.empty(0, np.float32)

    def clip(self, update: np.ndarray) -> None:
        """Plain training does not clip."""


def _in_fresh_process(name: str, folder: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.device_step", "--measure", name, "--folder", folder]
    numbers = {"--vocabulary": arguments.vocabulary, "--steps": arguments.steps, "--patches": arguments.patches}
    options = [str(word) for pair in numbers.items() for word in pair]
    environment = {"MALLOC_MMAP_THRESHOLD_": str(2**20), **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    _drop_from_page_cache(Path(folder) / "base" / WEIGHTS)
    done = subprocess.run([*command, *options], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _drop_from_page_cache(file: Path) -> None:
    """Let the next process read the file from storage: right after writing, Linux maps it in pieces of any size."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _table(result: dict[str, Any]) -> str:
    """Return the figures as text; shares are of the full training, memory above the loaded libraries."""
    variants = result["variants"]
    base_mb = median(found["baseline_mb"] for found in variants.values())
    reference = variants[REFERENCE]
    lines = [
        f"A step of {BATCH} x {LENGTH} tokens, d_model 256, 4 layers, vocabulary {result['vocabulary']:,}, one thread",
        result["machine"],
        f"Peak memory above the {base_mb:.0f} MB of Python and its libraries, in MB; file: pages of files in it,",
        "which the system can drop; clipped: with the clipped sum; share: of the first line",
        "",
        f"{'':28}{'update':>8}{'peak':>7}{'share':>7}{'file':>6}{'clipped':>9}{'share':>7}{'step':>9}{'share':>7}",
    ]
    for name, found in variants.items():
        fields = ("peak_mb", "clipped_peak_mb", "step_ms")
        peak, clipped, step = (f"{found[field] / reference[field]:.3f}" for field in fields)
        lines.append(
            f"{name:28}{found['update_mb']:8.1f}{found['peak_mb']:7.0f}{peak:>7}{found['file_mb']:6.0f}"
            f"{found['clipped_peak_mb']:9.0f}{clipped:>7}{found['step_ms']:6.0f} ms{step:>7}"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=100_000, help="entries, V")
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes for each variant")
    parser.add_argument("--steps", type=int, default=5, help="timed steps in each process")
    parser.add_argument("--patches", type=int, default=1, help="earlier rounds whose changes the device has received")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
