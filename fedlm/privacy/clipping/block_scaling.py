"""In which coordinates an update is clipped and noised: blocks are scaled before the clip and scaled back after it.

Groups of blocks g (adapters, rows, ...) have public scales s_g. A device clips `y = Delta_g / s_g` and the release is
multiplied by s_g (`fedlm.privacy.adaptive.allocation`): the sum of y has sensitivity C whatever the scales are, as long
as they depend on public data and earlier releases alone, so noise of standard deviation z C in y is noise z C s_g in
Delta.

Per-group clipping is the same thing with a bound of its own for each group. With clip norms C_g and standard deviations
sigma_g, scales `sigma_g / (z C)` make the noise isotropic in y, where group g is bounded by `z C_g / sigma_g` times C;
the sum of the squares of those bounds is one, which is the accounting of groups noised on the same cohort.

`noise` serves the allocation as published alone (2410.02912): unequal noise *after* one clip. Its multipliers are at
least one, so that the accounted noise is the least that any coordinate gets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlm.codec import coded
from fedlm.errors import ConfigError
from fedlm.trainable.parts import Part
from fedlm.trainable.spec import Vector

MAX_SCALE = 1e6
_ROUNDING = 1e-9

Floats = npt.NDArray[np.float64]


@coded
@dataclass(frozen=True)
class BlockScaling:
    """Scales, bounds and noise of the groups of an update vector.

    Arguments:
        spans: `(start, stop, group)` of each block, contiguous from 0; together they cover the vector.
        scales: (G,) s_g.
        limits: (G,) bounds of |y_g| in units of the clip norm, their squares summing to at most one; empty: none.
        noise: (G,) noise multipliers of the groups in units of the accounted one, at least 1; empty: all 1.

    Guarantee:
        The block scaling is applied to one device's update before it is clipped, and to the noised sum: it changes
        neither the sensitivity in y nor, being at least one, the least noise.
    """

    spans: tuple[tuple[int, int, int], ...]
    scales: tuple[float, ...]
    limits: tuple[float, ...] = ()
    noise: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what would break the guarantee."""
        num_groups, place = len(self.scales), 0
        for start, stop, group in self.spans:
            if start != place or stop < start or not 0 <= group < num_groups:
                raise ConfigError(
                    f"span {(start, stop, group)} must begin at {place} and name one of {num_groups} groups"
                )
            place = stop
        if not all(1 / MAX_SCALE <= scale <= MAX_SCALE for scale in self.scales):
            raise ConfigError(f"scales {self.scales} must lie within [{1 / MAX_SCALE:g}, {MAX_SCALE:g}]")
        if len(self.limits) not in (0, num_groups) or len(self.noise) not in (0, num_groups):
            raise ConfigError(
                f"limits {self.limits} and noise {self.noise} need one value for each of {num_groups} groups"
            )
        squares = math.fsum(limit**2 for limit in self.limits)
        if not all(limit > 0 for limit in self.limits) or squares > 1 + _ROUNDING:
            raise ConfigError(f"limits {self.limits} must be positive, their squares summing to at most 1 ({squares})")
        if not all(1 <= value <= MAX_SCALE for value in self.noise):
            raise ConfigError(f"noise {self.noise} must be at least 1: less than is accounted for would be a lie")

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.scales)

    @property
    def size(self) -> int:
        """Coordinates P that the spans cover."""
        return self.spans[-1][1] if self.spans else 0

    def scaled(self, parts: Sequence[Part], clip_norm: float) -> tuple[list[Part], Floats]:
        """Return an update in the coordinates of the clip, groups bounded, and |y_g|^2 of each group before the bound.

        Arguments:
            parts: One device's update, as for `ClippedSum.add_parts`.
            clip_norm: C.

        Returns:
            Parts of one group each, in order; squares (G,), not finite where the update is not.
        """
        pieces = [piece for part in parts for piece in self._split(part)]
        squares = np.zeros(self.num_groups)
        scaled: list[tuple[Part, int]] = []
        with np.errstate(all="ignore"):
            for part, group in pieces:
                values = part.values * np.float32(1 / self.scales[group])
                squares[group] += float(np.square(values, dtype=np.float64).sum())
                scaled.append((Part(part.offset, values, part.rows), group))
            return [self._bounded(part, group, squares, clip_norm) for part, group in scaled], squares

    def restore(self, vector: Vector) -> None:
        """Multiply a released vector (P,) by the scales of its groups, in place."""
        for start, stop, group in self.spans:
            vector[start:stop] *= np.float32(self.scales[group])

    def noise_spans(self) -> list[tuple[int, int, float]]:
        """Return `(start, stop, noise multiplier)` of the coordinates; one span where all have the same."""
        if not self.noise:
            return [(0, self.size, 1.0)]
        return [(start, stop, self.noise[group]) for start, stop, group in self.spans]

    def _split(self, part: Part) -> list[tuple[Part, int]]:
        """Return a part as parts of one group each; rows belong to one block, a run may cross several."""
        touched = [span for span in self.spans if span[0] < max(part.stop, part.offset + 1) and span[1] > part.offset]
        if part.rows is not None:
            return [(part, touched[0][2])]
        pieces = []
        for start, stop, group in touched:
            low, high = max(start, part.offset), min(stop, part.stop)
            pieces.append((Part(low, part.values[low - part.offset : high - part.offset]), group))
        return pieces

    def _bounded(self, part: Part, group: int, squares: Floats, clip_norm: float) -> Part:
        if not self.limits:
            return part
        norm, limit = math.sqrt(squares[group]), self.limits[group] * clip_norm
        if not norm > limit:
            return part
        return Part(part.offset, part.values * np.float32(limit / norm * (1 - 2**-21)), part.rows)
