"""Sensitivities against all participation patterns of a small number of rounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlm.errors import ConfigError
from fedlm.privacy.mechanisms import Participation, create, toeplitz
from fedlm.privacy.mechanisms.banded import Banded
from fedlm.privacy.mechanisms.base import Floats
from fedlm.privacy.mechanisms.blt import Blt
from fedlm.privacy.mechanisms.tree import Tree, TreeNoise, zeta
from fedlm.privacy.noise.lattice import NoiseStream, reproducible_key


def patterns(rounds: int, separation: int, most: int) -> Iterator[Floats]:
    """Every set of at most `most` rounds, `separation` apart, as a vector (T,) of zeros and ones."""
    for times in range(1, most + 1):
        for chosen in combinations(range(rounds), times):
            if all(later - earlier >= separation for earlier, later in pairwise(chosen)):
                yield np.isin(np.arange(rounds), chosen).astype(float)


def dense(column: Floats) -> Floats:
    size = len(column)
    return np.array([[column[t - s] if t >= s else 0.0 for s in range(size)] for t in range(size)])


def nodes(rounds: int) -> Floats:
    """Which rounds each complete dyadic block holds (nodes, T)."""
    rows = [
        (np.arange(rounds) >> height) == place
        for height in range(rounds.bit_length())
        for place in range(rounds >> height)
    ]
    return np.array(rows, dtype=float).reshape(-1, rounds)


columns = st.lists(st.floats(0, 1), min_size=0, max_size=9).map(
    lambda rest: np.array([1.0, *sorted(rest, reverse=True)])
)


@settings(max_examples=40, deadline=None)
@given(column=columns, separation=st.integers(1, 6), most=st.integers(1, 4))
def test_toeplitz_sensitivity_is_the_worst_pattern(column: Floats, separation: int, most: int) -> None:
    matrix = dense(column)
    worst = max(float(np.linalg.norm(matrix @ pattern)) for pattern in patterns(len(column), separation, most))
    assert toeplitz.sensitivity(column, separation=separation, participations=most) == pytest.approx(worst, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(column=columns, separation=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_no_directions_of_updates_are_worse_than_equal_ones(column: Floats, separation: int, seed: int) -> None:
    rng, matrix = np.random.default_rng(seed), dense(column)
    found = toeplitz.sensitivity(column, separation=separation, participations=3)
    for pattern in patterns(len(column), separation, 3):
        updates = rng.normal(size=(len(column), 3))
        updates /= np.maximum(1, np.linalg.norm(updates, axis=1, keepdims=True))  # norms of at most 1
        assert np.linalg.norm(matrix @ (pattern[:, None] * updates)) <= found * (1 + 1e-12)


@pytest.mark.parametrize("column", [[1.0, 0.5, 0.6], [1.0, -0.1], [1.0, 0.2, -0.2]])
def test_columns_without_the_exact_formula_are_refused(column: list[float]) -> None:
    with pytest.raises(ConfigError, match="non-negative and non-increasing"):
        toeplitz.sensitivity(np.array(column), separation=1, participations=2)


@settings(max_examples=40, deadline=None)
@given(numbers=st.lists(st.floats(0.001, 0.999), min_size=2, max_size=8, unique=True))
def test_interlacing_blts_have_falling_columns_and_exact_inverses(numbers: list[float]) -> None:
    chain = sorted(numbers[: len(numbers) // 2 * 2], reverse=True)
    chain = [number for number, before in zip(chain, [1.0, *chain], strict=False) if before - number > 1e-4]
    chain = chain[: len(chain) // 2 * 2]
    if not chain:
        return
    rule = Participation("separated", 4, 1, 14, separation=4)
    made = Blt(rule, tuple(chain[0::2]), tuple(chain[1::2]))
    assert made.column[0] == 1
    assert made.column.min() >= 0
    assert np.diff(made.column).max() <= 0
    inverse = np.linalg.inv(dense(made.column))
    assert made.prefix_rmse() == pytest.approx(np.sqrt(((np.tri(14) @ inverse) ** 2).sum() / 14), rel=1e-9)
    assert made.sensitivity(14) == pytest.approx(
        max(float(np.linalg.norm(dense(made.column) @ pattern)) for pattern in patterns(14, 4, 4)), rel=1e-12
    )


@pytest.mark.parametrize("releases", range(1, 13))
@pytest.mark.parametrize("bands", [1, 3, 4])
def test_banded_columns_of_one_user_do_not_overlap(bands: int, releases: int) -> None:
    rule = Participation("separated", 4, 1, 12, separation=4)
    made = Banded(rule, bands)
    matrix = dense(made.column)[:releases, :releases]
    for pattern in patterns(releases, 4, 3):
        moved = np.linalg.norm(matrix @ pattern)
        alone = np.linalg.norm(matrix * pattern, axis=0)  # each of the user's rounds by itself
        assert moved == pytest.approx(np.linalg.norm(alone))
        assert alone.max() <= made._column_norm(releases) * (1 + 1e-12)
        assert pattern.sum() <= Banded(replace(rule, sampler="cyclic_poisson"), bands)._sampled_rounds(releases)
        assert moved <= made.sensitivity(releases) * (1 + 1e-12)


@pytest.mark.parametrize("rounds", [1, 2, 5, 7, 8, 11, 13, 16])
@pytest.mark.parametrize("separation", [1, 2, 3, 5, 8])
def test_zeta_counts_the_overlaps_of_the_worst_pattern(rounds: int, separation: int) -> None:
    blocks = nodes(rounds)
    counts: dict[int, float] = {}
    for pattern in patterns(rounds, separation, 5):
        times = int(pattern.sum())
        counts[times] = max(counts.get(times, 0.0), float(((blocks @ pattern) ** 2).sum()))
    for most in range(1, 6):
        assert zeta(rounds, separation, most) == max(value for times, value in counts.items() if times <= most)


def test_packing_rounds_as_early_as_possible_is_not_always_the_worst_for_a_tree() -> None:
    packed = np.isin(np.arange(2000), np.arange(40) * 50).astype(float)
    assert float(((nodes(2000) @ packed) ** 2).sum()) < zeta(2000, 50, 40)


def errors_of(rounds: int) -> Floats:
    """The linear map (T, draws) from a tree's draws to its noise, found by regression on many coordinates."""
    size, noise, draws = 500, TreeNoise(500, rounds), []
    rows = []
    for number in range(1, rounds + 1):
        stream = NoiseStream(reproducible_key(3, number))
        for _ in range((number & -number).bit_length()):
            draws.append(np.empty(size))
            stream.normals(draws[-1])
        total = np.zeros(size, np.int64)
        noise.add_to(total, 2.0**50, NoiseStream(reproducible_key(3, number)))
        rows.append(total / 2.0**50)
    solution, *_ = np.linalg.lstsq(np.array(draws).T, np.array(rows).T, rcond=None)
    return np.asarray(solution.T)


@pytest.mark.parametrize("rounds", [1, 4, 7, 13, 16])
def test_honakers_estimates_are_the_best_linear_ones(rounds: int) -> None:
    prefix_errors = np.cumsum(errors_of(rounds), axis=0)
    for done in range(1, rounds + 1):
        # Least squares on all complete blocks: the estimate of x_1 + ... + x_t is 1^T pinv(blocks) y.
        best = np.ones(done) @ np.linalg.pinv(nodes(done))
        assert np.linalg.norm(prefix_errors[done - 1]) == pytest.approx(np.linalg.norm(best), rel=1e-4)


def test_what_a_tree_releases_reveals_no_more_than_its_nodes() -> None:
    errors = errors_of(13)
    precision = np.linalg.inv(errors @ errors.T)  # (T, T) of the released noise
    for pattern in patterns(13, 3, 5):
        assert pattern @ precision @ pattern <= zeta(13, 3, 5) * (1 + 1e-4)
    one = np.eye(13)[0]
    assert one @ precision @ one == pytest.approx(((nodes(13) @ one) ** 2).sum(), rel=0.5)


@pytest.mark.parametrize("name", ["gaussian", "blt", "banded", "tree", "local"])
def test_sensitivity_grows_with_rounds_and_shrinks_with_the_rule(name: str) -> None:
    made = create(name, Participation("separated", 40, 4, 40, separation=8), delta=1e-6)
    assert isinstance(made, Blt | Banded | Tree) or name in ("gaussian", "local")
    of = [made.sensitivity(t) for t in range(41)]  # type: ignore[attr-defined]
    assert of[0] == 0
    assert all(before <= after for before, after in pairwise(of))
    assert made.sensitivity(40, separation=10) <= of[-1]  # type: ignore[attr-defined]
    assert made.sensitivity(40, max_participations=2) <= of[-1]  # type: ignore[attr-defined]
    assert made.sensitivity(40, separation=1) >= of[-1]  # type: ignore[attr-defined]
