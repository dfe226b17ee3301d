"""Whitening is the matrix of the mechanism, and makes what the mechanism really draws independent."""

from __future__ import annotations

import numpy as np
import pytest

from fedlm.auditing.whitening import whitening
from fedlm.privacy.mechanisms import Mechanism, Participation, create
from fedlm.privacy.noise.lattice import NoiseStream, reproducible_key

ROUNDS = 24
RULE = Participation("separated", 6_000, 1_000, ROUNDS, separation=6, max_participations=4)
NAMES = ["gaussian", "blt", "banded", "tree"]


def mechanism(name: str) -> Mechanism:
    options = {"bands": 6} if name == "banded" else {}
    return create(name, RULE, delta=1e-6, noise_multiplier=1.0, **options)


@pytest.mark.parametrize("name", ["blt", "banded"])
def test_it_is_the_matrix_of_the_mechanism(name: str) -> None:
    made = mechanism(name)
    column = made.column  # type: ignore[attr-defined]
    lag = np.subtract.outer(np.arange(ROUNDS), np.arange(ROUNDS))
    expected = np.where(lag >= 0, column[np.abs(lag)], 0.0)
    assert np.allclose(whitening(made, ROUNDS), expected, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_whitened_noise_is_independent(name: str) -> None:
    made, size = mechanism(name), 20_000
    noise, rows = made.new_noise(size), np.zeros((ROUNDS, size), np.int64)
    for t, row in enumerate(rows):
        noise.add_to(row, 2.0**40, NoiseStream(reproducible_key(5, t)))
    white = whitening(made, ROUNDS) @ (rows / 2.0**40)  # (T, P)
    covariance = white @ white.T / size
    assert np.abs(covariance - np.eye(ROUNDS)).max() < 5.5 * np.sqrt(2 / size)


@pytest.mark.parametrize("name", NAMES)
def test_no_allowed_user_is_stronger_than_the_sensitivity(name: str) -> None:
    made = mechanism(name)
    matrix = whitening(made, ROUNDS)
    worst = max(np.linalg.norm(matrix[:, first::6].sum(axis=1)) for first in range(6))
    moved = made.sensitivity(ROUNDS)  # type: ignore[attr-defined]
    assert worst <= moved * (1 + 1e-4)
    if name != "tree":  # whose releases say less than the nodes that are accounted for
        assert worst == pytest.approx(moved, rel=1e-4)
