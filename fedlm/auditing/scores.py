"""Scores of gradient canaries from what was released: how much of each direction the releases hold.

Release t is v_t = (sum of contributions + noise)_t, the noise (C^-1 Z)_t with C the mechanism's matrix (identity for
independent noise). Whitened releases C V have independent noise, and canary j, if it takes part with weight w_tj in
round t, adds C w_j times its direction to them. The matched filter and its score are

    x_j = <c_j, u_j> / (|u_j| / sqrt(P)),    u_j = sum_t b_tj v_t,    b_j = C^T C w_j

Against a stranger's direction u_j is fixed, so x_j has mean 0 and variance 1 exactly, whatever users, noise and
strategy made of u_j. A member's score has mean |C w_j| / z if the noise dominates |u_j|, and less otherwise.

Everything is a function of the inner products below, so canaries are drawn once and releases need not be held twice.

Legend: T rounds, k canaries, P coordinates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Products:
    """Inner products of releases with canaries and with each other.

    Arguments:
        dots: (T, k) <sqrt(P) c_j, v_t>.
        gram: (T, T) <v_t, v_s>.
    """

    dots: Floats
    gram: Floats


def products(releases: Vectors, batches: Iterable[tuple[slice, Vectors]], num_canaries: int) -> Products:
    """Return the inner products.

    Arguments:
        releases: (T, P); a coordinate that a round did not release is zero.
        batches: Canaries' numbers and signs (B, P), as `Canaries.batches` yields them.
        num_canaries: k.
    """
    dots = np.zeros((len(releases), num_canaries))
    for numbers, signs in batches:
        dots[:, numbers] = releases @ signs.T  # (T, B)
    return Products(dots, (releases @ releases.T).astype(np.float64))


def scores(found: Products, matrix: Floats, weights: Floats) -> Floats:
    """Return each canary's score (k,).

    Arguments:
        found: Inner products.
        matrix: (T, T) C of the mechanism.
        weights: (T, k) w, each canary's part in each round as far as the analyst knows it; (T, 1) the same for all.

    Edge cases:
        A canary whose weights are all zero scores zero.
    """
    filters = matrix.T @ (matrix @ weights)  # (T, k)
    hits = (filters * found.dots).sum(axis=0)  # (k,)
    sizes = np.sqrt(np.maximum((filters * (found.gram @ filters)).sum(axis=0), 0.0))  # (k,) or (1,)
    return np.asarray(np.divide(hits, sizes, out=np.zeros_like(hits), where=np.broadcast_to(sizes > 0, hits.shape)))


def strengths(matrix: Floats, weights: Floats) -> Floats:
    """Return |C w_j| (k,): the sensitivity of the mechanism to a user of these participations."""
    return np.asarray(np.linalg.norm(matrix @ weights, axis=0))
