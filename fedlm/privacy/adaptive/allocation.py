"""Adaptive noise allocation (ANADP, Li et al. 2024, 2410.02912), made sound.

The paper gives important parameters less noise: importance from moving averages of sensitivity |w g| and of its
deviation (AdaLoRA), noise in proportion to its inverse, normalised so that the overall noise matches. With one clip
over all parameters this is not private at the stated epsilon: the least noise anywhere decides
(docs/noise_allocation.md has the table).

The sound form allocates *signal* instead: updates are divided by public scales s_g by group before the clip, and the
release is multiplied by them (`fedlm.privacy.clipping.block_scaling`). The multiplier z stays what it was for any
scales that depend on public data and earlier releases. Minimising sum_g w_g d_g s_g^2 (harm of the noise) under fixed
sum_g m_g / s_g^2 (energy that meets the clip) gives

    s_g ~ (m_g / (w_g d_g))^(1/4),   sum_g m_g / s_g^2 = sum_g m_g

m_g = E |Delta_(u,g)|^2 from the share-vector query (a paid side query), w_g from released aggregates with the noise's
variance subtracted (post-processing), d_g the coordinates of the group. Exact: the privacy. Ours: the damping, the
bounds [1/30, 30], one group for each kind of block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlm.codec import coded
from fedlm.errors import ConfigError
from fedlm.privacy.clipping.block_scaling import BlockScaling
from fedlm.ranges import require_count
from fedlm.trainable.spec import UpdateSpec, Vector

KINDS = ("isotropic", "public", "adaptive", "per_group", "published")
SHARE = 0.1  # of the share-vector query: z_f = 10 z, 0.5 % more noise on the update
LARGEST_SCALE = 30.0
_DAMPING = 0.2  # part of the way, in logarithms, to the optimum of what one round tells
_SENSITIVITY_DECAY, _UNCERTAINTY_DECAY, _MOMENT_DECAY = 0.85, 0.85, 0.9  # AdaLoRA's beta_1 and beta_2; ours
_WARM_UP_ROUNDS = 10  # what is left of the noise after subtraction dominates the first averages
_LEAST_IMPORTANCE = (
    1e-2  # of the largest: a block that seems to matter less (all zeros, or noise alone) may yet be wrong
)
_LEAST_MOMENT = 1e-4  # of the energy: noise can make a share zero or negative

Floats = npt.NDArray[np.float64]


@coded
@dataclass(frozen=True)
class AllocationState:
    """What the allocation knows after some releases: public, small, stored with every checkpoint.

    Arguments:
        scales: (G,) s_g of the next round.
        moments: (G,) m_g as parts of their sum.
        sensitivity: (G,) moving average of the root mean square of w * g, noise subtracted.
        uncertainty: (G,) moving average of its deviation.
        num_rounds: Releases that it has seen.
    """

    scales: tuple[float, ...]
    moments: tuple[float, ...]
    sensitivity: tuple[float, ...]
    uncertainty: tuple[float, ...]
    num_rounds: int = 0

    def __post_init__(self) -> None:
        """Check that every group has its figures."""
        lengths = {len(values) for values in (self.scales, self.moments, self.sensitivity, self.uncertainty)}
        if len(lengths) != 1:
            raise ConfigError(f"allocation {self} must have one figure of each kind for every group")
        require_count("rounds of the allocation", self.num_rounds)

    @classmethod
    def start(
        cls, moments: Sequence[float], sizes: Sequence[int], *, scaled: bool, importance: Sequence[float] = ()
    ) -> AllocationState:
        """Return the state before round 1.

        Arguments:
            moments: (G,) m_g from public data, up to a factor; equal parts where there is none.
            sizes: (G,) d_g.
            scaled: Start from the best scales for these moments; False: from ones.
            importance: (G,) w_g from public data, up to a factor; empty: all equal.
        """
        parts = np.asarray(moments, np.float64) / np.sum(moments)
        weights = np.asarray(importance or np.ones(len(sizes)))
        scales = best_scales(parts, weights, np.asarray(sizes, np.float64)) if scaled else np.ones(len(sizes))
        nothing = (0.0,) * len(sizes)
        return cls(_tuple(scales), _tuple(parts), nothing, nothing)

    @property
    def importance(self) -> Floats:
        """w_g (G,), with mean one: sensitivity times uncertainty; all equal until the averages mean something."""
        product = np.asarray(self.sensitivity) * np.asarray(self.uncertainty)
        if self.num_rounds < _WARM_UP_ROUNDS or not product.any():
            return np.ones(len(product))
        product = np.maximum(product, product.max() * _LEAST_IMPORTANCE)
        return np.asarray(product / product.mean())


def groups_of(spec: UpdateSpec) -> tuple[str, ...]:
    """Return the names of the groups, in order of their first block: the kinds of blocks."""
    return tuple(dict.fromkeys(block.kind for block in spec.blocks))


def group_sizes(spec: UpdateSpec) -> Floats:
    """Return d_g (G,)."""
    sizes = dict.fromkeys(groups_of(spec), 0)
    for block in spec.blocks:
        sizes[block.kind] += block.size
    return np.array(list(sizes.values()), np.float64)


def spans_of(spec: UpdateSpec) -> tuple[tuple[int, int, int], ...]:
    """Return `(start, stop, group)` of each block."""
    order = {name: index for index, name in enumerate(groups_of(spec))}
    return tuple((block.offset, block.offset + block.size, order[block.kind]) for block in spec.blocks)


def best_scales(moments: Floats, importance: Floats, sizes: Floats) -> Floats:
    """Return s_g (G,) = (m_g / (w_g d_g))^(1/4), normalised and bounded.

    Arguments:
        moments: (G,) m_g, positive.
        importance: (G,) w_g, positive.
        sizes: (G,) d_g.
    """
    moments = np.maximum(moments, _LEAST_MOMENT * moments.sum())
    raw = (moments / (importance * sizes)) ** 0.25
    scales = raw * np.sqrt((moments / raw**2).sum() / moments.sum())  # now sum m / s^2 = sum m
    return np.asarray(np.clip(scales, 1 / LARGEST_SCALE, LARGEST_SCALE))


def per_group(spec: UpdateSpec, moments: Floats, importance: Floats) -> BlockScaling:
    """Return per-group clipping: C_g ~ sqrt(m_g), the best sigma_g for them.

    sigma_g^2 = z^2 C_g / sqrt(w_g d_g) * sum_h C_h sqrt(w_h d_h), so that sum_g (C_g / sigma_g)^2 = 1 / z^2.
    """
    sizes = group_sizes(spec)
    clips = np.sqrt(np.maximum(moments, _LEAST_MOMENT * moments.sum()) / moments.sum())  # (G,) C_g / C
    weights = np.sqrt(importance * sizes)
    scales = np.sqrt(clips / weights * (clips * weights).sum())  # (G,) sigma_g / (z C)
    return BlockScaling(spans_of(spec), _tuple(scales), limits=_tuple(clips / scales * (1 - 1e-12)))


def published_noise(importance: Floats, sizes: Floats, *, floor: float) -> Floats:
    """Return the noise of the form as published, in units of the accounted noise: at least 1, at most floor^-2.

    The paper normalises the noise so that its overall size is that of the isotropic mechanism, and some groups get
    less: here the least they can get is `floor` times it, and the accountant takes that least for all.
    """
    raw = 1 / importance
    ratio = raw / np.sqrt((sizes * raw**2).sum() / sizes.sum())  # mean square one, over coordinates
    return np.asarray(np.clip(ratio, floor, 1 / floor) / floor)


def updated(
    state: AllocationState, spec: UpdateSpec, *, values: Vector, mean: Vector, noise_std: float, noise: Floats,
    shares: Floats, adapts_scales: bool,
) -> AllocationState:  # fmt: skip
    """Return the state after a release: a function of public values and releases alone.

    Arguments:
        state: Before it.
        spec: The round's.
        values: (P,) the model's values in the round.
        mean: (P,) the released mean update.
        noise_std: Of a coordinate of `mean` whose group has scale 1.
        noise: (G,) what multiplies it by group, scales included.
        shares: (G,) the answer to the share-vector query.
        adapts_scales: False leaves the scales as they are (the form as published adapts the noise instead).
    """
    signal = np.zeros(len(state.scales))
    sizes = group_sizes(spec)
    for start, stop, group in spans_of(spec):
        weights = values[start:stop].astype(np.float64)
        found = (weights * mean[start:stop]) ** 2 - (weights * noise_std * noise[group]) ** 2
        signal[group] += float(found.sum())
    sensed = np.sqrt(np.maximum(signal, 0.0) / sizes)
    before = np.asarray(state.sensitivity)
    sensitivity = _SENSITIVITY_DECAY * before + (1 - _SENSITIVITY_DECAY) * sensed
    deviation = np.abs(sensed - sensitivity)
    uncertainty = _UNCERTAINTY_DECAY * np.asarray(state.uncertainty) + (1 - _UNCERTAINTY_DECAY) * deviation
    moments = _moments(state, shares)
    fresh = AllocationState(
        state.scales, _tuple(moments), _tuple(sensitivity), _tuple(uncertainty), state.num_rounds + 1
    )
    if not adapts_scales:
        return fresh
    best = best_scales(moments, fresh.importance, sizes)
    scales = np.asarray(state.scales) ** (1 - _DAMPING) * best**_DAMPING
    return AllocationState(
        _tuple(np.clip(scales, 1 / LARGEST_SCALE, LARGEST_SCALE)), fresh.moments, fresh.sensitivity, fresh.uncertainty,
        fresh.num_rounds,
    )  # fmt: skip


def _moments(state: AllocationState, shares: Floats) -> Floats:
    """Return m_g (G,) with sum one: the shares were taken of y, so a share of Delta is s_g^2 times it."""
    found = np.maximum(shares, 0.0) * np.asarray(state.scales) ** 2
    if not found.any():
        return np.asarray(state.moments)
    mixed = _MOMENT_DECAY * np.asarray(state.moments) + (1 - _MOMENT_DECAY) * found / found.sum()
    mixed = np.maximum(mixed, _LEAST_MOMENT)
    return np.asarray(mixed / mixed.sum())


def _tuple(values: Floats) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
