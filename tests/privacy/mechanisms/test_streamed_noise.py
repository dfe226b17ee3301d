"""Streamed noise against dense matrices: its law, its lattice, what a restart rebuilds."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import numpy.typing as npt
import pytest

from fedlm.privacy.mechanisms import Mechanism, Participation, create, toeplitz
from fedlm.privacy.mechanisms.banded import Banded
from fedlm.privacy.mechanisms.base import Floats, RoundNoise
from fedlm.privacy.mechanisms.blt import Blt
from fedlm.privacy.mechanisms.streaming import StreamedNoise
from fedlm.privacy.noise.lattice import NoiseStream, add_on_lattice, reproducible_key

ROUNDS, STD = 37, 0.7 * 2.0**40
RULE = Participation("separated", 50, 5, ROUNDS, separation=10)
CASES = {
    "gaussian": create("gaussian", RULE, delta=1e-6),
    "blt 1": create("blt", RULE, delta=1e-6, buffers=1),
    "blt 3": create("blt", RULE, delta=1e-6, buffers=3),
    "banded 1": create("banded", RULE, delta=1e-6, bands=1),
    "banded 2": create("banded", RULE, delta=1e-6, bands=2),
    "banded 10": create("banded", RULE, delta=1e-6, bands=10),
    "tree": create("tree", RULE, delta=1e-6),
}
TOEPLITZ = [name for name in CASES if name.startswith(("blt", "banded"))]


def stream(number: int) -> NoiseStream:
    return NoiseStream(reproducible_key(11, number))


def released(noise: RoundNoise, size: int, first: int = 1) -> npt.NDArray[np.int64]:
    """Noise of the rounds from `first` on (T - first + 1, P), in units of the lattice's integers."""
    rows = []
    for number in range(first, ROUNDS + 1):
        total = np.zeros(size, np.int64)
        noise.add_to(total, STD, stream(number))
        rows.append(total)
    return np.array(rows)


def draws(size: int) -> Floats:
    """The same draws of N(0, 1), (T, P), for mechanisms that draw once a round."""
    found = np.empty((ROUNDS, size))
    for number, row in enumerate(found, start=1):
        stream(number).normals(row)
    return found


def matrix(mechanism: Mechanism) -> Floats:
    """C (T, T), written out."""
    assert isinstance(mechanism, Blt | Banded)
    return np.array([[mechanism.column[t - s] if t >= s else 0.0 for s in range(ROUNDS)] for t in range(ROUNDS)])


@pytest.mark.parametrize("name", TOEPLITZ)
def test_streaming_is_the_product_with_the_inverse_of_the_dense_matrix(name: str) -> None:
    size = 16_500  # more than a chunk
    found = released(CASES[name].new_noise(size), size) / STD
    expected = np.linalg.solve(matrix(CASES[name]), draws(size))
    assert np.abs(found - expected).max() < 2.0**-19


@pytest.mark.parametrize("name", TOEPLITZ)
def test_whitened_noise_is_iid_with_variance_one(name: str) -> None:
    size = 20_000
    white = matrix(CASES[name]) @ (released(CASES[name].new_noise(size), size) / STD)  # (T, P)
    covariance = white @ white.T / size  # (T, T)
    assert np.abs(np.diag(covariance) - 1).max() < 5 * np.sqrt(2 / size)
    for lag in range(1, ROUNDS):
        assert np.abs(np.diag(covariance, lag)).max() < 5 / np.sqrt(size)
    assert abs((white[:, 1:] * white[:, :-1]).mean()) < 5 / np.sqrt(white.size)


@pytest.mark.parametrize("name", CASES)
def test_prefix_sums_have_the_promised_error(name: str) -> None:
    size = 20_000
    sums = np.cumsum(released(CASES[name].new_noise(size), size) / STD, axis=0)  # (T, P)
    assert np.sqrt((sums**2).mean()) == pytest.approx(CASES[name].prefix_rmse(), rel=0.01)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("before", [1, 7, 12, 32])
def test_replayed_rounds_give_the_same_later_noise(name: str, before: int) -> None:
    size = 16_390
    whole = released(CASES[name].new_noise(size), size)
    resumed = CASES[name].new_noise(size)
    for number in range(1, before + 1):
        resumed.replay(stream(number))
    assert np.array_equal(released(resumed, size, first=before + 1), whole[before:])


@pytest.mark.parametrize("name", CASES)
def test_noise_is_rounded_on_the_lattice_of_its_sum(name: str) -> None:
    step = 2 ** (39 - 20)
    offset = np.arange(3_000) * 7_919 + 1  # off the lattice
    alone, shifted, total = (CASES[name].new_noise(3_000) for _ in range(3))
    for number in range(1, ROUNDS + 1):
        noise, moved, sums = np.zeros(3_000, np.int64), np.full(3_000, 5 * step), offset.copy()
        alone.add_to(noise, STD, stream(number))
        shifted.add_to(moved, STD, stream(number))
        total.add_to(sums, STD, stream(number))
        assert not (sums % step).any()
        assert np.array_equal(moved - noise, np.full(3_000, 5 * step))
        assert np.abs(sums - offset - noise).max() <= step


def test_the_shared_rounding_is_that_of_a_single_release() -> None:
    total, part = (np.arange(1_000) * 7_919 + 1 for _ in range(2))
    stream(1).add_to(total, STD)
    noise = np.empty(1_000)
    stream(1).normals(noise)
    add_on_lattice(part, noise * STD, STD)
    assert np.array_equal(total, part)


@pytest.mark.parametrize("name", CASES)
def test_noise_can_be_neither_pickled_nor_copied(name: str) -> None:
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="neither pickled, copied nor checkpointed"):
            copying(CASES[name].new_noise(10))


@pytest.mark.parametrize(("name", "vectors"), [("blt 1", 1), ("blt 3", 3), ("banded 10", 9), ("tree", 6)])
def test_memory_is_linear_in_buffers(name: str, vectors: int) -> None:
    for size in (100, 1_000):
        noise = CASES[name].new_noise(size)
        assert isinstance(noise, StreamedNoise)
        assert noise.num_bytes == 8 * size * vectors


def test_the_largest_noise_on_full_sums_does_not_overflow() -> None:
    for name in (*TOEPLITZ, "tree"):
        noise = CASES[name].new_noise(2_000)
        assert isinstance(noise, StreamedNoise)
        std = 2.0**58 / noise._gain
        for number in range(1, ROUNDS + 1):
            total = np.full(2_000, 2**62)
            noise.add_to(total, std, stream(number))
            assert total.min() > 2**61  # a wrapped number would be negative
        with pytest.raises(AssertionError, match="outside"):
            noise.add_to(total, std * 1.01, stream(1))


@pytest.mark.parametrize("name", TOEPLITZ)
def test_no_row_of_the_inverse_exceeds_the_gain(name: str) -> None:
    noise = CASES[name].new_noise(1)
    assert isinstance(noise, StreamedNoise)
    assert np.abs(np.linalg.inv(matrix(CASES[name]))).sum(axis=1).max() <= noise._gain * (1 + 1e-12)


def test_independent_noise_is_that_of_the_stream() -> None:
    noise, expected = CASES["gaussian"].new_noise(500), np.zeros(500, np.int64)
    noise.replay(stream(1))
    stream(2).add_to(expected, STD)
    total = np.zeros(500, np.int64)
    noise.add_to(total, STD, stream(2))
    assert np.array_equal(total, expected)
    assert not CASES["gaussian"].keeps_noise
    assert all(CASES[name].keeps_noise for name in (*TOEPLITZ, "tree"))


def test_the_inverse_column_is_that_of_the_dense_inverse() -> None:
    column = toeplitz.square_root_column(ROUNDS)
    dense = np.array([[column[t - s] if t >= s else 0.0 for s in range(ROUNDS)] for t in range(ROUNDS)])
    assert np.allclose(dense @ dense, np.tri(ROUNDS))
    assert np.allclose(np.linalg.inv(dense)[:, 0], toeplitz.inverse_column(column, ROUNDS))
    sums = np.tri(ROUNDS) @ np.linalg.inv(dense)
    expected = np.sqrt((sums**2).sum(axis=1).mean())
    assert toeplitz.prefix_rmse(toeplitz.inverse_column(column, ROUNDS)) == pytest.approx(expected)
