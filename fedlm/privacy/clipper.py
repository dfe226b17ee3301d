"""What clips: the clip norm, the coordinates in which it is applied, and what else a round asks of a device."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from fedlm.errors import ConfigError, DataError
from fedlm.privacy.fixed_point import CAPACITY, CAPACITY_UNCLIPPED, UNITS
from fedlm.privacy.geometry import Geometry
from fedlm.privacy.ranges import require_number
from fedlm.privacy.riders import Rider, rider_from_fields, update_share
from fedlm.privacy.skellam import Skellam

if TYPE_CHECKING:
    from fedlm.privacy.clipping import ClippedSum


@dataclass(frozen=True)
class Clipper:
    """The part of a plan that a node gets: it can clip and sum, and knows neither seed nor noise.

    Arguments:
        clip_norm: C, or infinity when the plan does not clip.
        geometry: Coordinates in which to clip; None: those of the update.
        riders: Further queries of the round.
        encoder: Where each device adds its share of the noise itself: how.
    """

    clip_norm: float
    geometry: Geometry | None = None
    riders: tuple[Rider, ...] = ()
    encoder: Skellam | None = None

    def __post_init__(self) -> None:
        """Refuse norms whose fixed-point factors would leave the range of fp64, and riders that leave no update."""
        if self.clip_norm != math.inf:
            require_number("privacy.clip_norm", self.clip_norm, low=1e-12, high=1e12)
        elif self.geometry or self.riders or self.encoder:
            raise ConfigError("without clipping there is no geometry, rider or encoder; set privacy.enabled = true")
        if not all(rider.share > 0 for rider in self.riders) or sum(rider.share**2 for rider in self.riders) > 0.5:
            shares = {rider.name: rider.share for rider in self.riders}
            raise ConfigError(
                f"the queries beside the update take the shares {shares}, their squares at most 0.5 in all"
            )

    @cached_property
    def update_share(self) -> float:
        """a_0: the update's part of the clip norm."""
        return update_share(self.riders)

    @cached_property
    def num_answers(self) -> int:
        """Q: coordinates of all riders' answers."""
        return sum(rider.size for rider in self.riders)

    def to_text(self) -> str:
        """Return this clipper as text, for the message that asks a node to train."""
        geometry = self.geometry.to_fields() if self.geometry else None
        riders = [rider.to_fields() for rider in self.riders]
        encoder = self.encoder.to_fields() if self.encoder else None
        return json.dumps({"clip_norm": self.clip_norm, "geometry": geometry, "riders": riders, "encoder": encoder})

    @classmethod
    def from_text(cls, text: str) -> Clipper:
        """Return the clipper that `to_text` described, equal to it.

        Raises:
            DataError: Not such a text.
            ConfigError: Values out of range.
        """
        try:
            fields = json.loads(text)
            clip_norm, geometry, riders, encoder = (fields[k] for k in ("clip_norm", "geometry", "riders", "encoder"))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"a clipper cannot be read ({error}); server and node are of different versions") from error
        found, design = Geometry.from_fields(geometry) if geometry else None, None
        if encoder:
            design = Skellam.from_fields(encoder)
        return cls(clip_norm, found, tuple(rider_from_fields(rider) for rider in riders), design)

    @property
    def unit(self) -> float:
        """What 1 in the integer vector stands for."""
        return 1 / UNITS if self.clip_norm == math.inf else self.clip_norm / UNITS

    @property
    def capacity(self) -> int:
        """How many devices one sum can hold without overflow."""
        if self.encoder:
            return self.encoder.max_devices
        return CAPACITY_UNCLIPPED if self.clip_norm == math.inf else CAPACITY

    def new_sum(self, size: int) -> ClippedSum:
        """Return an empty sum of `size` coordinates."""
        from fedlm.privacy import clipping  # whose sums know their clipper

        return clipping.new_sum(size, self)
