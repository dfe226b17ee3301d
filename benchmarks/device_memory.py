"""Does `fedlm.planning.device_cost` predict the peak memory of a real device process?

Every case runs in a fresh process that does what a device does: it maps the base from its file, applies the rows of an
earlier round, trains, clips its update into a sum (`benchmarks.device_step`, whose allocator settings it shares). The
text is drawn from the vocabulary's public frequencies, or is that of a real user. The error is given twice: of the
whole process, and of what lies above Python and its libraries. `HELD_OUT` had no part in finding the estimator's
constants.

    python -m benchmarks.device_memory
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.device_step import Device, _drop_from_page_cache
from benchmarks.measure import machine, reset_peak, status_mb
from fedlm.config.load import load_config
from fedlm.config.schema import Config
from fedlm.data.vocabulary_source import load_vocabulary
from fedlm.experiment import Experiment
from fedlm.models.factory import build_model, empty_model
from fedlm.models.weights import set_weights, weights
from fedlm.planning.device_cost import LIBRARIES_MB, CostModel, Floats
from fedlm.pretraining.cache import WEIGHTS, load_base, save_base
from fedlm.randomness import seed_key, stream
from fedlm.trainable.build import build_trainable
from fedlm.trainable.rows import row_set

_ROOT = Path(__file__).resolve().parents[1]
_D256 = ("model.d_model=256", "model.num_layers=4")
_LSTM = ("model.name='lstm'", "trainable.lora.targets=['recurrent']")
_LORA, _BIAS = ("trainable.lora.rank=8",), ("trainable.lora.rank=0", "trainable.bias=true")
_DENSE = ("trainable.lora.rank=0", "trainable.dense=['*']")
_RANK_16 = "trainable.lora.rank=16"
_SAMPLED, _FULL = ("loss.kind='sampled_softmax'",), ("loss.kind='full_softmax'",)
SHORT, BATCH, LONG = 56, 513, 1600  # tokens: the median of ubuntu_irc, one full batch, the default job's largest user


def _shape(width: int, layers: int) -> tuple[str, ...]:
    return f"model.d_model={width}", f"model.num_layers={layers}"


def _batch(size: int, length: int) -> tuple[str, ...]:
    return f"local.batch_size={size}", f"data.sequence_length={length}"


@dataclass(frozen=True)
class Case:
    """One device: a config and how much text it has, drawn from the public frequencies or the start of a user's own."""

    vocabulary: int
    num_tokens: int
    rows: int
    overrides: tuple[str, ...]
    is_real: bool = False

    def config(self, folder: Path, *others: str) -> Config:
        """Return the experiment; `others` are further overrides."""
        sizes = (f"vocabulary.size={self.vocabulary}", f"trainable.embedding_rows.count={self.rows}")
        return load_config(None, [*sizes, f"model.base={folder / 'base'}", *self.overrides, *others])


CASES = {
    "10k NCE LoRA rows, full batch": Case(10_000, BATCH, 2_000, _LORA),
    "10k full softmax, all weights, short": Case(10_000, SHORT, 10_000, (*_DENSE, *_FULL)),
    "20k sampled bias rows, full batch": Case(20_000, BATCH, 5_000, (*_D256, *_BIAS, *_SAMPLED)),
    "30k LSTM NCE LoRA rows, full batch": Case(30_000, BATCH, 5_000, (*_LSTM, *_D256, *_LORA)),
    "30k LSTM full softmax, dense, full batch": Case(30_000, BATCH, 0, (*_LSTM, *_D256, *_DENSE, *_FULL)),
    "50k NCE dense, short": Case(50_000, SHORT, 0, (*_D256, *_DENSE)),
    "100k NCE LoRA rows, full batch": Case(100_000, BATCH, 10_000, (*_D256, *_LORA)),
    "100k full softmax, LoRA, full batch": Case(100_000, BATCH, 0, (*_LORA, *_FULL)),
    "100k NCE LoRA, full batch": Case(100_000, BATCH, 0, (*_D256, *_LORA)),
    "100k sampled LoRA rows, short": Case(100_000, SHORT, 10_000, (*_D256, *_LORA, *_SAMPLED)),
    "100k NCE LoRA rows, long": Case(100_000, LONG, 10_000, (*_D256, *_LORA)),
    "100k full softmax, all weights, full batch": Case(100_000, BATCH, 100_000, (*_D256, *_DENSE, *_FULL)),
    "20k NCE LoRA rows, dropout, untied": Case(
        20_000, BATCH, 5_000, (*_D256, *_LORA, "model.dropout=0.1", "model.tied=false")
    ),
    "50k NCE LoRA rows, sequences of 128": Case(
        50_000, 2049, 5_000, (*_D256, *_LORA, "data.sequence_length=128", "data.max_tokens_per_user=4000")
    ),
}
HELD_OUT = {
    "20k NCE LoRA 16 rows, 128 x 6, real": Case(20_000, 800, 3_000, (*_shape(128, 6), _RANK_16), is_real=True),
    "30k sampled LoRA rows, 192 x 3, 8 x 64": Case(
        30_000, 700, 4_000, (*_shape(192, 3), *_LORA, *_SAMPLED, *_batch(8, 64))
    ),
    "70k NCE LoRA 16 rows, 320 x 5, real": Case(70_000, LONG, 7_000, (*_shape(320, 5), _RANK_16), is_real=True),
    "70k LSTM sampled LoRA rows, 320 x 2, real": Case(
        70_000, 900, 7_000, (*_LSTM, *_shape(320, 2), *_LORA, *_SAMPLED), is_real=True
    ),
    "30k LSTM NCE rows, 512 x 1, 4 x 16": Case(30_000, 300, 2_000, (*_LSTM, *_shape(512, 1), *_BIAS, *_batch(4, 16))),
    "70k full softmax, LoRA rows, 192 x 4": Case(70_000, BATCH, 5_000, (*_shape(192, 4), *_LORA, *_FULL)),
    "30k NCE dense, 512 x 8": Case(30_000, BATCH, 0, (*_shape(512, 8), *_DENSE)),
    "70k NCE bias rows, 128 x 2, 2 epochs, real": Case(
        70_000, 1_000, 20_000, (*_shape(128, 2), *_BIAS, "local.epochs=2"), is_real=True
    ),
    "50k NCE LoRA rows, 192 x 4, untied, real": Case(
        50_000, 100, 5_000, (*_shape(192, 4), *_LORA, "model.tied=false"), is_real=True
    ),
    "100k sampled LoRA rows, 256 x 4, real": Case(100_000, LONG, 10_000, (*_D256, *_LORA, *_SAMPLED), is_real=True),
    "30k full softmax, all weights, 192 x 3, real": Case(
        30_000, SHORT, 30_000, (*_shape(192, 3), *_DENSE, *_FULL), is_real=True
    ),
}
ALL = CASES | HELD_OUT


def main() -> None:
    """Predict and measure every case and print both."""
    arguments = _parser().parse_args()
    if arguments.measure:
        print(json.dumps(measure(ALL[arguments.measure], Path(arguments.folder))))
        return
    found = {name: compare(name) for name in arguments.cases or (HELD_OUT if arguments.held_out else CASES)}
    result = {"machine": machine(), "predicted_libraries_mb": LIBRARIES_MB, "cases": found}
    print(json.dumps(result, indent=2) if arguments.json else _table(result))


def compare(name: str) -> dict[str, float]:
    """Return the predicted and the measured peak of a case, MB, measured in a fresh process."""
    case = ALL[name]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        predicted_mb = prepare(case, folder)
        _drop_from_page_cache(folder / "base" / WEIGHTS)
        command = [sys.executable, "-m", "benchmarks.device_memory", "--measure", name, "--folder", text]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    above_mb = measured["peak_mb"] - measured["libraries_mb"]
    return {
        "predicted_mb": predicted_mb,
        **measured,
        "error": predicted_mb / measured["peak_mb"] - 1,
        "error_above_libraries": (predicted_mb - LIBRARIES_MB) / above_mb - 1,
    }


def prepare(case: Case, folder: Path) -> float:
    """Write a base, public frequencies and a text; return the predicted peak, MB."""
    config = case.config(folder)
    frequencies = load_vocabulary(config).frequencies
    np.save(folder / "frequencies.npy", frequencies)
    np.save(folder / "tokens.npy", _tokens(case, config, frequencies))
    save_base(config, weights(build_model(config, frequencies, config.seed)), {})
    model = empty_model(config, case.vocabulary)
    rows = row_set(config.trainable.embedding_rows, frequencies, seed=config.seed, round_number=2)
    spec = build_trainable(model, config).spec.with_rows(rows)
    return float(CostModel(config, spec, model).peak_mb(np.array([case.num_tokens]))[0])


def _tokens(case: Case, config: Config, frequencies: Floats) -> npt.NDArray[np.int32]:
    """Return the device's text: drawn, or the start of the first user's that is long enough."""
    if not case.is_real:
        rng = stream(seed_key(config.seed), "benchmark/text")
        return rng.choice(case.vocabulary, case.num_tokens, p=frequencies).astype(np.int32)
    store = Experiment.open(config).store
    user = next(int(u) for u in store.users("train") if store.num_tokens[u] >= case.num_tokens)
    return np.array(store.tokens(user)[: case.num_tokens])


def measure(case: Case, folder: Path) -> dict[str, float]:
    """Return the peak of a device in this process, which does nothing else, and what its libraries took before."""
    torch.set_num_threads(1)
    tokens, frequencies = np.load(folder / "tokens.npy"), np.load(folder / "frequencies.npy")
    config = case.config(folder)
    _warm_up(case, folder)
    gc.collect()
    reset_peak()
    libraries_mb = status_mb("VmRSS")
    model = empty_model(config, case.vocabulary)
    set_weights(model, load_base(config))
    device = Device(model, config, frequencies, num_patches=1)
    device.clip(device.step(tokens))
    return {"libraries_mb": libraries_mb, "peak_mb": status_mb("VmHWM")}


def _warm_up(case: Case, folder: Path) -> None:
    """Run one step of a tiny model: first calls import and compile code, whatever the model's size."""
    size = 64
    few = ("vocabulary.size=64", "loss.negatives=16", f"trainable.embedding_rows.count={min(case.rows, 32)}")
    tiny = case.config(folder, *few, "model.d_model=16", "model.num_layers=1")
    frequencies = np.full(size, 1 / size)
    device = Device(build_model(tiny, frequencies, 1), tiny, frequencies, 1)
    device.clip(device.step(np.arange(BATCH, dtype=np.int32) % size))


def _table(result: dict[str, Any]) -> str:
    cases = result["cases"]
    libraries_mb = np.mean([found["libraries_mb"] for found in cases.values()])
    lines = [
        "Peak memory of a device's process, MB: predicted and measured; above: without Python and its libraries",
        result["machine"],
        f"Python and its libraries: {result['predicted_libraries_mb']:.0f} MB predicted, {libraries_mb:.0f} measured",
        "",
        f"{'':44}{'predicted':>10}{'measured':>10}{'error':>8}{'above':>8}",
    ]
    for name, found in cases.items():
        errors = f"{found['error']:+8.1%}{found['error_above_libraries']:+8.1%}"
        lines.append(f"{name:44}{found['predicted_mb']:10.0f}{found['peak_mb']:10.0f}{errors}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all when left out")
    parser.add_argument("--held-out", action="store_true", help="the cases that had no part in finding the constants")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", choices=ALL, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
