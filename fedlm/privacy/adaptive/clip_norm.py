"""Adaptive clipping: Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping" (1905.03871).

    C <- C exp(-eta (b - gamma)),   b: noisy fraction of devices whose update is within C

converges geometrically to the gamma-quantile of the update norms, from above and from below. The bits ride along with
the update (`fedlm.privacy.clipping.side_queries.ClipBit`), so that one Gaussian covers both; with the paper's sigma_b =
n / 20 on the sum of bits, the update's multiplier is `z_delta = (z^-2 - (2 sigma_b)^-2)^-1/2` at gamma = 1/2 [exact].

A device that stays away pushes the clip norm nowhere; the paper divides by the devices that came, which would have to
be paid for. A round's C is fixed before the round, and its noise follows it (`fedlm.privacy.clipping.clipped_sum`: the
unit of the sum is C's).
"""

from __future__ import annotations

import math

MAX_SHARE = 0.2
_LOWEST, _HIGHEST = 1e-12, 1e12


def bit_share(*, noise_multiplier: float, expected_cohort: int, quantile: float) -> float:
    """Return the share of the clip norm that the bits take, from sigma_b = n / 20; at most 0.2 for tiny cohorts.

    Arguments:
        noise_multiplier: z.
        expected_cohort: n.
        quantile: gamma.
    """
    bound = max(quantile, 1 - quantile)
    return min(MAX_SHARE, 20 * noise_multiplier * bound / expected_cohort)


def next_clip_norm(clip_norm: float, *, excess: float, learning_rate: float) -> float:
    """Return the next round's C.

    Arguments:
        clip_norm: C of this round.
        excess: Released mean of (bit - gamma).
        learning_rate: eta; the paper's is 0.2.
    """
    step = math.exp(-learning_rate * max(-1.0, min(1.0, excess)))  # noise cannot push further than all devices could
    return min(max(clip_norm * step, _LOWEST), _HIGHEST)
