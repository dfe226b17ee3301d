"""The self-test of product backends: its errors are those of the arithmetic, and it leaves torch as it was."""

from __future__ import annotations

import pytest
import torch

from fedlm.training import matmul_backend


@pytest.fixture(scope="module")
def rates() -> dict[str, matmul_backend.Rate]:
    return dict(zip(matmul_backend.BACKENDS, matmul_backend.measure(shape=(256, 64, 128)), strict=True))


def test_errors_are_those_of_the_arithmetic(rates: dict[str, matmul_backend.Rate]) -> None:
    assert rates["fp32"].error < 64 * 2**-24  # a sum of 64 products of fp32 numbers
    assert 2**-12 < rates["bf16"].error < 2**-6  # eight bits of mantissa


def test_rates_are_positive(rates: dict[str, matmul_backend.Rate]) -> None:
    assert all(rate.gigaflops > 0 for rate in rates.values())


def test_the_choice_is_exact_and_leaves_torch_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    chosen = matmul_backend.choose()
    assert chosen in ("fp32", "onednn")
    assert torch.get_float32_matmul_precision() == before
    (rate,) = matmul_backend.measure([chosen])
    assert rate.error < matmul_backend.LARGEST_ERROR


def test_use_reaches_torch_and_back() -> None:
    before = torch.get_float32_matmul_precision()
    matmul_backend.use("onednn")
    assert torch.get_float32_matmul_precision() == "medium"
    matmul_backend.use("fp32")
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision(before)
