"""Simulated secure aggregation: masks cancel whoever is missing; one device's vector looks uniform."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedlm.errors import DataError
from fedlm.privacy.secure_sum import Participant, Words, survivors_sum

ROOT_KEY = b"known to the devices alone"


def participants(devices: Sequence[int], bits: int, round_number: int = 1) -> dict[int, Participant]:
    return {d: Participant(d, devices, round_number=round_number, bits=bits, root=ROOT_KEY) for d in devices}


@settings(max_examples=40, deadline=None)
@given(
    devices=st.lists(st.integers(0, 10**6), min_size=1, max_size=7, unique=True),
    bits=st.sampled_from([1, 17, 32, 63, 64]),
    data=st.data(),
)
def test_the_sum_of_the_survivors_comes_out_exactly(devices: list[int], bits: int, data: st.DataObject) -> None:
    words = st.lists(st.integers(0, 2**bits - 1), min_size=5, max_size=5)
    vectors = {device: data.draw(words) for device in devices}
    survivors = data.draw(st.lists(st.sampled_from(devices), min_size=1, unique=True))
    everyone = participants(devices, bits)
    masked = {d: everyone[d].mask(np.array(vectors[d], np.uint64)) for d in survivors}
    revealed = [everyone[d].reveal(set(devices) - set(survivors)) for d in survivors]
    total = survivors_sum(masked, revealed, bits=bits)
    assert total.tolist() == [sum(vectors[d][p] for d in survivors) % 2**bits for p in range(5)]


def uniformity(words: Words, bits: int) -> float:
    """P value of the two-sided chi-square test that the lowest and the highest byte are uniform."""
    worst = 1.0
    for shift in (0, bits - 8):
        counts = np.bincount((words >> np.uint64(shift) & np.uint64(255)).astype(np.int64), minlength=256)
        statistic = float(((counts - words.size / 256) ** 2).sum() / (words.size / 256))
        worst = min(worst, 2 * min(chi2.cdf(statistic, 255), chi2.sf(statistic, 255)))
    return worst


@pytest.mark.parametrize("bits", [20, 64])
def test_what_the_server_sees_of_one_device_is_uniform(bits: int) -> None:
    constant = np.full(100_000, 3, np.uint64)
    everyone = participants([4, 9, 11], bits)
    masked = {d: one.mask(constant) for d, one in everyone.items()}
    assert uniformity(constant, bits) == 0.0  # the test can fail
    for words in masked.values():
        assert uniformity(words, bits) > 1e-6
    # Nor do two devices of one round, or one device in two rounds, say anything together but what cancels.
    again = participants([4, 9, 11], bits, round_number=2)[4].mask(constant)
    ones = np.uint64(2**bits - 1)
    assert uniformity((masked[4] - again) & ones, bits) > 1e-6
    assert uniformity((masked[4] + masked[9]) & ones, bits) > 1e-6


def test_masks_of_a_late_device_stay_on_when_its_pairs_were_revealed() -> None:
    # Device 9 was taken for absent; its vector arrives after all. Without self masks it would now be readable.
    constant = np.full(100_000, 3, np.uint64)
    everyone = participants([4, 9, 11], 32)
    late = everyone[9].mask(constant)
    revealed = [everyone[d].reveal({9}) for d in (4, 11)]
    opened = survivors_sum({4: late, 11: np.zeros_like(late)}, revealed, bits=32)
    assert uniformity(opened, 32) > 1e-6


def test_a_device_reveals_once_and_only_pairs_it_has() -> None:
    everyone = participants([1, 2, 3], 32)
    with pytest.raises(DataError, match="shares no mask with"):
        everyone[1].reveal({1})
    with pytest.raises(DataError, match="shares no mask with"):
        everyone[1].reveal({7})
    everyone[1].reveal({3})
    with pytest.raises(DataError, match="has revealed its masks already"):
        everyone[1].reveal(set())


def test_a_sum_without_all_keys_is_refused() -> None:
    everyone = participants([1, 2, 3], 32)
    masked = {d: everyone[d].mask(np.ones(4, np.uint64)) for d in (1, 2)}
    with pytest.raises(DataError, match="need all of them"):
        survivors_sum(masked, [everyone[1].reveal({3})], bits=32)
    with pytest.raises(DataError, match="at least 1"):
        survivors_sum({}, [], bits=32)


def test_keys_stay_out_of_texts() -> None:
    assert "b'" not in repr(participants([1, 2], 8)[1].reveal({2}))
