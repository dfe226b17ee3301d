"""The noise: its law, its lattice, its freshness, its generator."""

from __future__ import annotations

import copy
import os
import pickle
import warnings

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from fedlm.privacy.noise.lattice import MAX_STD, NoiseStream, fresh_key, reproducible_key


def draw(size: int, std: float, stream: NoiseStream | None = None) -> npt.NDArray[np.int64]:
    total = np.zeros(size, np.int64)
    (stream or NoiseStream(fresh_key())).add_to(total, std)
    return total


# A reproducible stream: a p-value under a fixed key cannot fail by chance.
@pytest.mark.parametrize("std", [3e4, 2.0**40, 0.67 * 2.0**40, 2.0**57])
def test_law_is_the_standard_normal_to_the_tails(std: float) -> None:
    noise = draw(400_000, std, NoiseStream(reproducible_key(5, 1))) / std
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert np.mean(noise) == pytest.approx(0, abs=5 / np.sqrt(noise.size))
    assert np.var(noise) == pytest.approx(1, abs=5 * np.sqrt(2 / noise.size))
    assert stats.kurtosis(noise) == pytest.approx(0, abs=5 * np.sqrt(24 / noise.size))  # Laplace has 3
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 5 / np.sqrt(noise.size)


@pytest.mark.parametrize("std", [1000.0, 2.0**40, 1.5 * 2.0**44])
def test_the_lattice_of_the_result_is_public(std: float) -> None:
    step = max(1, 2 ** (int(np.log2(std)) - 20))
    stream = [NoiseStream(reproducible_key(1, 1)) for _ in range(2)]
    total = np.arange(50_000) * 7_919 + 1  # a sum off the lattice
    stream[0].add_to(total, std)
    assert not (total % step).any()
    assert np.gcd.reduce(total) == step
    noise = draw(50_000, std, stream[1])
    assert np.abs(total - (noise + np.arange(50_000) * 7_919 + 1)).max() <= step


def test_noise_has_the_resolution_of_the_lattice() -> None:
    # Half precision has some 30,000 values in all; the lattice has 2^20 in one standard deviation.
    assert np.unique(draw(100_000, 2.0**40)).size > 95_000


def test_normals_are_drawn_in_double_precision() -> None:
    """The lattice hides it: fp32 draws have 2^23 values in a strip of the ziggurat, and tails that end at 24 bits."""
    draws = np.empty(100_000)
    NoiseStream(reproducible_key(6, 1)).normals(draws)
    assert np.mean(draws == draws.astype(np.float32)) < 1e-3
    mantissas = np.frexp(draws)[0] * 2.0**53
    assert np.mean(mantissas % 2**20 == 0) < 1e-3  # nothing coarser than fp64 but finer than fp32 either


def test_every_stream_is_fresh() -> None:
    first, second = draw(10_000, 2.0**40), draw(10_000, 2.0**40)
    assert not (first == second).any() or (first == second).mean() < 1e-3
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06


def test_noise_does_not_depend_on_chunks_and_covers_every_coordinate() -> None:
    long, short = (draw(size, 2.0**40, NoiseStream(reproducible_key(3, 2))) for size in (50_001, 16_385))
    assert np.array_equal(long[:16_385], short)
    assert (long != 0).mean() > 0.999


def test_reproducible_noise_is_keyed_by_seed_and_round() -> None:
    noise = {
        (seed, number): draw(100, 2.0**40, NoiseStream(reproducible_key(seed, number))).tobytes()
        for seed in (1, 2)
        for number in (1, 2)
    }
    assert len(set(noise.values())) == 4
    assert noise[2, 1] == draw(100, 2.0**40, NoiseStream(reproducible_key(2, 1))).tobytes()


def test_streams_can_be_neither_pickled_nor_copied() -> None:
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="neither pickled, copied nor checkpointed"):
            copying(NoiseStream(fresh_key()))


def test_a_forked_process_draws_other_noise() -> None:
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads that other tests left
        child = os.fork()
    if child == 0:
        os.write(sender, draw(64, 2.0**40).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(receiver, 64 * 8)
    os.close(receiver)
    os.close(sender)
    assert len(theirs) == 64 * 8
    assert theirs != draw(64, 2.0**40).tobytes()


def test_the_largest_noise_on_a_full_sum_does_not_overflow() -> None:
    for sign in (1, -1):
        total = np.full(300_000, sign * 2**62)
        NoiseStream(reproducible_key(1, 1)).add_to(total, MAX_STD)
        deviation = (total.astype(np.float64) - sign * 2.0**62) / MAX_STD
        assert np.std(deviation) == pytest.approx(1, abs=0.01)


def test_the_generator_is_aes_128_in_counter_mode() -> None:
    ciphers = pytest.importorskip("cryptography.hazmat.primitives.ciphers")
    key = 0x2B7E151628AED2A6ABF7158809CF4F3C
    words = NoiseStream(key)._generator.bit_generator.random_raw(64)
    encryptor = ciphers.Cipher(ciphers.algorithms.AES(key.to_bytes(16, "little")), ciphers.modes.ECB()).encryptor()
    blocks = b"".join(encryptor.update(counter.to_bytes(16, "little")) for counter in range(40))
    expected = np.frombuffer(blocks, "<u8").tolist()
    start = expected.index(int(words[0]))
    assert words.tolist()[:60] == expected[start : start + 60]
