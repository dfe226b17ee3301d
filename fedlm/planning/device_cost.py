"""What local training costs a device: the peak memory of its process and its floating-point work.

The device is a process that runs `fedlm.training.local` for one round, as `benchmarks.device_step` does: it maps the
base from its file, applies the rows that the server sent, trains, subtracts, clips into a sum. Blocks of
`LARGE_BLOCK` bytes and more go back to the system at once (glibc's MALLOC_MMAP_THRESHOLD_), as a small device should
have it.

Derived from the program: the sizes of all arrays, the order in which they live (`step_trace`), the pages of the mapped
base (`touched`). Measured, and the same for all configurations: `LIBRARIES_MB`, `WORKSPACE_MB`, `HEAP_SPREAD`. They are
constants and not measured anew on each machine, so that who is eligible in a simulated fleet does not depend on where
it runs; `benchmarks.device_memory` prints what this machine measures.

Legend: V vocabulary, D width, P length of the update, L rows in play, U devices, k points where a figure is computed.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fedlm.config.schema import Config, LoraConfig, LossConfig
from fedlm.data.vocabulary_source import load_vocabulary
from fedlm.losses.negatives import NoiseDistribution
from fedlm.models.base import LanguageModel
from fedlm.models.factory import OWN_MODELS
from fedlm.planning.step_trace import StepTrace, shapes_of, trace_step
from fedlm.planning.touched_pages import (
    FAULT_AROUND,
    PAGE,
    received_probabilities,
    touched_blocks,
    word_probabilities,
)
from fedlm.registry import LOSSES
from fedlm.trainable.adapters import inject_adapter
from fedlm.trainable.spec import UpdateSpec

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

LIBRARIES_MB = (
    434.0  # Python 3.11, torch 2.13 for processors, peft and transformers, after a first step of a tiny model
)
WORKSPACE_MB = 5.0  # packing buffers of matrix products, and code pages that only larger models reach
HEAP_SPREAD = 1.7  # extent of the heap over what lives in it: freed blocks below LARGE_BLOCK leave holes
HEAP_SPREAD_LATER = 2.3  # the same from the second step on
LARGE_BLOCK = 2**20
HUGE_PAGE, HUGE_ARRAY = 2**21, 2**22  # numpy asks the system for huge pages in arrays of 4 MiB and more
CLIP_CHUNK = 16_384  # coordinates that the clipped sum adds at a time; where all are zero it stays untouched

PARTS = (
    "Python and libraries",
    "base",
    "table pages read",
    "rows received",
    "trained copies",
    "vocabulary and text",
    "rows in play",
    "activations and gradients",
    "update",
    "clipped sum",
)
_BYTES_PER_WORD = 36  # frequencies, cumulative noise, its logarithms, place in the row set and among the rows in play
_BYTES_PER_TOKEN = 17  # input, target and mask of a batch
_POINTS_TO_FULL, _POINTS_A_DOUBLING = 10, 4  # of the sizes between which the peak is interpolated


class Work(NamedTuple):
    """One device's training as the program sees it.

    Arguments:
        words: Tokens of its text.
        sequences: B of its largest batch; less than one for a sequence that is shorter than T.
        targets: N of that batch.
        steps: Batches, all epochs together.
    """

    words: int
    sequences: float
    targets: int
    steps: int


class CostModel:
    """Memory and work of a device as functions of how many tokens it holds.

    Arguments:
        config: The experiment.
        spec: The spec of a round (`with_rows`).
        model: Its structure counts, not its values: an `empty_model` will do, with or without adapters.
        frequencies: Public word frequencies (V,); None: those of the config's vocabulary, or for a pretrained model
            Zipf's law over its ids.
        num_patches: Earlier rounds whose rows the device has received.

    Raises:
        DataError: A model whose program cannot be traced.
    """

    def __init__(
        self,
        config: Config,
        spec: UpdateSpec,
        model: LanguageModel,
        *,
        frequencies: Floats | None = None,
        num_patches: int = 1,
    ) -> None:
        self._config, self._spec = config, spec
        self._width, self._num_tables = model.d_model, 1 if model.tied else 2
        self._frequencies = _frequencies(config, model.vocabulary_size) if frequencies is None else frequencies
        self._body_bytes = sum(4 * p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
        trained = frozenset(block.name for block in spec.blocks if block.kind != "rows")
        rows_train = bool(spec.row_blocks)
        self._step = _traced(
            model, config.loss, config.data.sequence_length, config.trainable.lora, trained, rows_train
        )
        self._whole = not LOSSES.resolve(config.loss.kind).draws_negatives
        every_row = np.arange(model.vocabulary_size if rows_train else 0)
        self._row_set = every_row if spec.row_ids is None else spec.row_ids
        self._noise = np.exp(NoiseDistribution(self._frequencies, config.loss, self._row_set).log_expected)
        received = received_probabilities(config.trainable.embedding_rows, self._frequencies, num_patches)
        self._totals: dict[int, float] = {}  # MB by tokens, as far as asked for
        self._private_pages = touched_blocks(received, 4 * self._width, PAGE)  # (pages,)

    def peak_mb(self, num_tokens: Counts) -> Floats:
        """Return the peak resident memory (U,), MB, of a device that holds `num_tokens` (U,) tokens.

        Interpolated between sizes that the config alone decides: whoever else is asked about changes no figure, or one
        device's data would decide whether another one trains (`server.participation`).
        """
        points = self._points(int(np.max(num_tokens, initial=0)))
        totals = [self._total_mb(int(point)) for point in points]  # (k,)
        return np.asarray(np.interp(num_tokens, points, totals), np.float64)

    def gigaflops(self, num_tokens: Counts) -> Floats:
        """Return the work (U,), 1e9 floating-point operations, 2 a multiply-add; matrix products alone count."""
        local, length = self._config.local, self._config.data.sequence_length
        targets = np.maximum(np.asarray(num_tokens, np.float64) - 1, 0)  # (U,)
        sequences = np.where(targets < length, targets / length, np.ceil(targets / length))
        steps = np.ceil(sequences / local.batch_size)
        constant, by_sequence, by_target, by_score = self._step.flops
        scored = by_target + by_score * len(self._frequencies)
        total = local.epochs * (constant * steps + by_sequence * sequences + scored * targets) / 1e9
        return np.asarray(total, np.float64)

    def parts_mb(self, num_tokens: Counts) -> dict[str, Floats]:
        """Return what the peak is made of: for each of `PARTS` MB (U,); of everything else the device holds less then.

        Computed one by one, for tables of a few devices.
        """
        rows = [self._parts(self._work(int(n))) for n in num_tokens]
        return {name: np.array([row.get(name, 0.0) for row in rows]) for name in PARTS}

    def _points(self, most: int) -> Counts:
        """Return the sizes to compute, up to the first that is not below `most`.

        They are both sides of some whole sequences up to a full batch, then even in the logarithm.
        """
        length, full = self._config.data.sequence_length, self._config.local.batch_size
        whole = np.unique(np.linspace(1, full, min(full, _POINTS_TO_FULL)).astype(np.int64)) * length + 1
        num_beyond = max(0, math.ceil(_POINTS_A_DOUBLING * math.log2(max(most, 1) / (full * length)))) + 1
        beyond = np.ceil((full * length + 2) * 2 ** (np.arange(num_beyond) / _POINTS_A_DOUBLING)).astype(np.int64)
        points = np.unique(np.concatenate([[0, 1, 2], whole, whole + 1, beyond]))
        return points[: int(np.searchsorted(points, most)) + 1]

    def _total_mb(self, num_tokens: int) -> float:
        if num_tokens not in self._totals:
            self._totals[num_tokens] = sum(self._parts(self._work(num_tokens)).values())
        return self._totals[num_tokens]

    def _work(self, words: int) -> Work:
        local, length = self._config.local, self._config.data.sequence_length
        targets = max(words - 1, 0)
        sequences = targets / length if targets < length else -(-targets // length)
        steps = local.epochs * -(-targets // (length * local.batch_size))
        return Work(words, min(sequences, local.batch_size), min(targets, local.batch_size * length), steps)

    def _parts(self, work: Work) -> dict[str, float]:
        """Return the parts, MB, at the fullest of the three moments: in a step, when subtracting, when clipping."""
        in_play = self._in_play(work)  # (V,)
        num_rows, num_moving = float(in_play.sum()), float(in_play[self._row_set].sum())
        rows = 4 * num_rows * (self._width * self._num_tables + 6)
        step, heap = self._step_bytes(work, num_rows)
        update, total = self._vector_bytes(in_play[self._row_set])
        moved = 4 * num_moving * self._width  # one table's differences; while they are made the update is untouched
        moments: list[dict[str, float]] = [
            {"rows in play": rows, "activations and gradients": step},
            {"rows in play": rows + moved, "activations and gradients": heap, "update": update},
            {"activations and gradients": heap, "update": update, "clipped sum": total},
        ]
        fullest = max(moments, key=lambda moment: sum(moment.values()))
        always = self._resident(work, in_play)
        return {"Python and libraries": LIBRARIES_MB} | {n: b / 1e6 for n, b in (always | fullest).items()}

    def _in_play(self, work: Work) -> Floats:
        """Return the probability (V,) that the device copies each row."""
        if self._whole:
            return np.ones(len(self._frequencies))
        return word_probabilities(self._frequencies, self._noise, work.words, work.steps)

    def _resident(self, work: Work, in_play: Floats) -> dict[str, float]:
        """Return the bytes of what stays from the start of the training to its end."""
        loss, num_words = self._config.loss, len(self._frequencies)
        windows = touched_blocks(in_play, 4 * self._width, FAULT_AROUND)
        read = np.repeat(windows, FAULT_AROUND // PAGE)[: len(self._private_pages)]
        read = read * (1 - self._private_pages[: len(read)])
        text = work.words * self._config.local.epochs * _BYTES_PER_TOKEN + 8 * work.steps * loss.negatives
        return {
            "base": self._body_bytes,
            "table pages read": self._num_tables * PAGE * float(read.sum()),
            "rows received": self._num_tables * PAGE * float(self._private_pages.sum()),
            "trained copies": 2 * 4 * self._spec.fixed_size,
            "vocabulary and text": _BYTES_PER_WORD * num_words + text,
        }

    def _step_bytes(self, work: Work, num_rows: float) -> tuple[float, float]:
        """Return the bytes of a step at its peak, and what it leaves behind in the heap."""
        if not work.steps:
            return 0.0, 0.0
        large, small = self._step.live_bytes(np.array([1.0, work.sequences, work.targets, num_rows]), LARGE_BLOCK)
        heap = (HEAP_SPREAD if work.steps == 1 else HEAP_SPREAD_LATER) * np.maximum.accumulate(small)  # (E,)
        workspace = 1e6 * WORKSPACE_MB
        return float((large + heap).max()) + workspace, float(small.max()) + workspace

    def _vector_bytes(self, moving: Floats) -> tuple[float, float]:
        """Return the resident bytes of the update (fp32) and of the clipped sum (int64): zeros take no memory."""
        fixed, size, width = self._spec.fixed_size, self._spec.size, self._width
        found = []
        for itemsize, block in ((4, PAGE), (8, 8 * CLIP_CHUNK)):
            block = HUGE_PAGE if itemsize * size >= HUGE_ARRAY else block
            touched = float(touched_blocks(moving, itemsize * width, block).sum()) * block
            rows = itemsize * len(moving) * (width * self._num_tables + 1)
            found.append(itemsize * fixed + min(self._num_tables * touched + itemsize * len(moving), rows))
        return found[0], found[1]


@lru_cache(maxsize=2)
def _frequencies(config: Config, vocabulary_size: int) -> Floats:
    if config.model.name in OWN_MODELS:
        return load_vocabulary(config).frequencies
    zipf = 1 / (np.arange(vocabulary_size) + 2.7) ** 1.07  # (V,)
    return np.asarray(zipf / zipf.sum(), np.float64)


@lru_cache(maxsize=16)  # the rounds of a run differ in their row sets alone, which the trace does not see
def _traced(
    model: LanguageModel, loss: LossConfig, length: int, lora: LoraConfig, trained: frozenset[str], rows_train: bool
) -> StepTrace:
    """Return the trace of a model in which exactly the parameters of these names train."""
    shapes = shapes_of(model)
    if not trained <= dict(shapes.named_parameters()).keys():  # no adapters yet
        with torch.random.fork_rng(devices=[]):  # peft draws initial values from the global generator
            inject_adapter(shapes, lora)
        shapes.to("meta")
    for name, parameter in shapes.named_parameters():
        parameter.requires_grad_(name in trained)
    return trace_step(shapes, loss, length=length, rows_train=rows_train)
