"""Renyi differential privacy at integer orders: for mechanisms whose loss has no closed form, and as a second opinion.

A curve holds the Renyi divergence of one release at orders 2, 3, ..., 1024. Curves of rounds add up.

Sources: Mironov 2017 (https://arxiv.org/abs/1702.07476), composition and Gaussian; Zhu and Wang 2019, theorem 5
(http://proceedings.mlr.press/v97/zhu19c.html), Poisson sampling of any mechanism; Canonne, Kamath and Steinke 2020,
proposition 12 (https://arxiv.org/abs/2004.00010), conversion to (epsilon, delta).

All are upper bounds: sampling by the general theorem (a factor 3 from the third moment on), the conversion, and the
least over integer orders only. `fedlm.privacy.accounting.subsampled_gaussian` is tighter wherever it applies.

>>> rates = gaussian(noise_multiplier=5.0)
>>> round(epsilon(10 * rates, delta=1e-6), 2)
3.13
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedlm.ranges import require_number

Curve = npt.NDArray[np.float64]

ORDERS: Curve = np.arange(2.0, 1025.0)
"""The orders alpha at which every curve is given."""


def gaussian(noise_multiplier: float) -> Curve:
    """Return the curve of one Gaussian release, alpha / (2 z^2), (orders,).

    Arguments:
        noise_multiplier: z, > 0.
    """
    z = require_number("noise_multiplier", noise_multiplier, above=0)
    return ORDERS / (2 * z * z)


def poisson_sampled(curve: Curve, sampling_probability: float) -> Curve:
    """Return the curve of a release whose cohort is Poisson-sampled.

    Arguments:
        curve: (orders,) of the same release without sampling, add or remove one.
        sampling_probability: q, in (0, 1].

    Returns:
        (orders,); nowhere above `curve`.
    """
    q = require_number("sampling_probability", sampling_probability, above=0, high=1)
    if q == 1.0:
        return curve.copy()
    from scipy.special import gammaln

    # The l-th term: log(C(alpha, l) (1 - q)^(alpha - l) q^l e^((l - 1) eps(l))), its part without alpha in front.
    orders = ORDERS.astype(np.int64)
    per_moment = ORDERS * math.log(q / (1 - q)) + (ORDERS - 1) * curve - gammaln(ORDERS + 1)  # (orders,)
    per_moment[1:] += math.log(3)  # from the third moment on
    sampled = np.empty_like(curve)
    for place, alpha in enumerate(orders):
        moments = per_moment[: place + 1] + gammaln(alpha + 1) - gammaln(alpha - orders[: place + 1] + 1)
        first = math.log1p(q * (alpha - 1)) - math.log1p(-q)  # (1 - q)^(alpha - 1) (1 + q (alpha - 1))
        total = np.logaddexp.reduce(np.append(moments, first)) + alpha * math.log1p(-q)
        sampled[place] = max(total, 0.0) / (alpha - 1)
    return np.minimum(sampled, curve)


def epsilon(curve: Curve, *, delta: float) -> float:
    """Return the least epsilon that the curve proves at `delta`.

    Arguments:
        curve: (orders,) of all releases together.
        delta: In (0, 1).
    """
    delta = require_number("delta", delta, above=0, below=1)
    bounds = curve + np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(0.0, float(bounds.min()))
