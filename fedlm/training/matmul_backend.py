"""Which backend this processor multiplies matrices fastest by, found by a self-test of time and error.

    fp32     torch's default
    onednn   torch.set_float32_matmul_precision("medium"): another library on some processors, twice as fast on a few;
             exact fp32 there, but rounded to bf16 where the processor has matrix tiles, hence the test of the error
    bf16     frozen weights and what they multiply rounded to bf16; everything that trains stays fp32

A backend changes the last bits, so it is chosen once, by whoever starts a run, and written into the run's config.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TALL = (2048, 256, 1024)  # (N, in, out) of a typical product: the tokens of a group through a feed-forward layer
REPEATS = 9
GAIN = 1.5  # clocks are noisy, and two runs on one machine must choose alike: only a large gain counts
LARGEST_ERROR = 1e-5  # relative to the largest entry; fp32 leaves about 1e-6, products rounded to bf16 about 4e-3
BACKENDS = ("fp32", "onednn", "bf16")


@dataclass(frozen=True)
class Rate:
    """What the self-test found for one backend.

    Arguments:
        gigaflops: Per second, the best of some tries.
        error: Largest difference from the product in fp64, relative to its largest entry.
    """

    gigaflops: float
    error: float


def use(backend: str) -> None:
    """Make this process multiply fp32 matrices by a backend; "auto" and "bf16" mean torch's default."""
    torch.set_float32_matmul_precision("medium" if backend == "onednn" else "highest")


def choose() -> str:
    """Return "onednn" where it is much faster than torch's default and as exact, else "fp32"."""
    plain, other = measure(["fp32", "onednn"])
    is_better = other.gigaflops > GAIN * plain.gigaflops and other.error < LARGEST_ERROR
    return "onednn" if is_better else "fp32"


def measure(backends: Sequence[str] = BACKENDS, shape: tuple[int, int, int] = TALL) -> list[Rate]:
    """Time the product x W^T by several backends in turn, on the threads that torch has, and compare with fp64.

    Arguments:
        backends: Of `BACKENDS`.
        shape: (N, in, out) of x (N, in) and W (out, in).
    """
    N, width, out = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, width, generator=generator)
    weight = torch.randn(out, width, generator=generator)
    exact = x.double() @ weight.double().T
    before = torch.get_float32_matmul_precision()
    seconds = dict.fromkeys(backends, float("inf"))
    found: dict[str, Tensor] = {}
    try:
        for _ in range(REPEATS):
            for backend in backends:
                use(backend)
                found[backend], elapsed = _timed(_product(backend, x, weight))
                seconds[backend] = min(seconds[backend], elapsed)
    finally:
        torch.set_float32_matmul_precision(before)
    errors = [float((found[backend].double() - exact).abs().max() / exact.abs().max()) for backend in backends]
    flops = 2 * N * width * out
    return [Rate(1e-9 * flops / seconds[backend], error) for backend, error in zip(backends, errors, strict=True)]


def _product(backend: str, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    if backend == "bf16":
        half = weight.bfloat16()
        return lambda: x.bfloat16() @ half.T
    return lambda: x @ weight.T


def _timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    started = time.perf_counter()
    return call(), time.perf_counter() - started
