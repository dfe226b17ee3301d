"""What workers ask Ray for: a share of the GPUs with which all of them find room."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.grids.ray_fleet import gpu_share

STEP = Fraction(1, 10_000)  # Ray's smallest part of a GPU


@pytest.mark.parametrize(
    ("num_gpus", "num_workers", "share"),
    [(0, 4, 0), (1, 1, 1), (1, 3, 0.3333), (1, 7, 0.1428), (2, 3, 0.5), (4, 4, 1), (5, 2, 2), (8, 3, 2), (3, 10, 0.25)],
)
def test_examples(num_gpus: int, num_workers: int, share: float) -> None:
    assert gpu_share(num_gpus, num_workers) == share


@given(num_gpus=st.integers(1, 64), num_workers=st.integers(1, 512))
def test_all_workers_find_room_and_no_larger_share_would_do(num_gpus: int, num_workers: int) -> None:
    share = Fraction(gpu_share(num_gpus, num_workers)).limit_denominator(10_000)

    def room(share: Fraction) -> int:
        """How many workers fit: a share is of one GPU, and above one it is of whole ones."""
        return num_gpus // int(share) if share >= 1 else num_gpus * math.floor(1 / share)

    assert share % STEP == 0 if share < 1 else share.denominator == 1
    assert room(share) >= num_workers
    larger = share + 1 if share >= 1 else share + STEP
    assert room(larger) < num_workers
