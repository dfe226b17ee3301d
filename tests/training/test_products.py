"""The self-test of product routes: its errors are those of the arithmetic, and it leaves torch as it was."""

from __future__ import annotations

import pytest
import torch

from fedlm.training import products


@pytest.fixture(scope="module")
def rates() -> dict[str, products.Rate]:
    return dict(zip(products.ROUTES, products.measure(shape=(256, 64, 128)), strict=True))


def test_errors_are_those_of_the_arithmetic(rates: dict[str, products.Rate]) -> None:
    assert rates["fp32"].error < 64 * 2**-24  # a sum of 64 products of fp32 numbers
    assert 2**-12 < rates["bf16"].error < 2**-6  # eight bits of mantissa


def test_rates_are_positive(rates: dict[str, products.Rate]) -> None:
    assert all(rate.gigaflops > 0 for rate in rates.values())


def test_the_choice_is_exact_and_leaves_torch_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    chosen = products.choose()
    assert chosen in ("fp32", "onednn")
    assert torch.get_float32_matmul_precision() == before
    (rate,) = products.measure([chosen])
    assert rate.error < products.LARGEST_ERROR


def test_use_reaches_torch_and_back() -> None:
    before = torch.get_float32_matmul_precision()
    products.use("onednn")
    assert torch.get_float32_matmul_precision() == "medium"
    products.use("fp32")
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision(before)
