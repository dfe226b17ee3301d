"""What clips: the clip norm, the coordinates in which it is applied, and what else a round asks of a device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from fedlm.codec import coded
from fedlm.errors import ConfigError
from fedlm.privacy.clipping.block_scaling import BlockScaling
from fedlm.privacy.clipping.side_queries import SideQuery, update_share
from fedlm.privacy.noise.fixed_point import CAPACITY, CAPACITY_UNCLIPPED, UNITS
from fedlm.privacy.noise.skellam_encoding import Skellam
from fedlm.ranges import require_number


@coded
@dataclass(frozen=True)
class ClipSpec:
    """The part of a plan that a node gets: it can clip and sum, and knows neither seed nor noise.

    Arguments:
        clip_norm: C, or infinity when the plan does not clip.
        block_scaling: Coordinates in which to clip; None: those of the update.
        side_queries: Further queries of the round.
        encoder: Where each device adds its share of the noise itself: how.
    """

    clip_norm: float
    block_scaling: BlockScaling | None = None
    side_queries: tuple[SideQuery, ...] = ()
    encoder: Skellam | None = None

    def __post_init__(self) -> None:
        """Refuse norms whose fixed-point factors would leave the range of fp64, and side queries that leave no
        update."""
        if self.clip_norm != math.inf:
            require_number("privacy.clip_norm", self.clip_norm, low=1e-12, high=1e12)
        elif self.block_scaling or self.side_queries or self.encoder:
            raise ConfigError(
                "without clipping there is no block scaling, side query or encoder; set privacy.enabled = true"
            )
        if (
            not all(side_query.share > 0 for side_query in self.side_queries)
            or sum(side_query.share**2 for side_query in self.side_queries) > 0.5
        ):
            shares = {side_query.name: side_query.share for side_query in self.side_queries}
            raise ConfigError(
                f"the queries beside the update take the shares {shares}, their squares at most 0.5 in all"
            )

    @cached_property
    def update_share(self) -> float:
        """a_0: the update's part of the clip norm."""
        return update_share(self.side_queries)

    @cached_property
    def num_answers(self) -> int:
        """Q: coordinates of all side queries' answers."""
        return sum(side_query.size for side_query in self.side_queries)

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
