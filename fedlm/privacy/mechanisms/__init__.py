"""Mechanisms of noise, one file each: `create` makes one for a participation rule, `fedlm.codec` restores a stored one.

mechanism   samplers, the default first                       a round's noise needs
gaussian    poisson, truncated_poisson, fixed, separated      nothing else
blt         separated                                         `buffers` vectors
banded      cyclic_poisson, separated                         `bands` - 1 vectors
tree        separated                                         log2 T vectors
local       separated, any other                              nothing else
skellam     poisson, fixed, separated                         devices that add it
"""

from __future__ import annotations

from dataclasses import replace

from fedlm.errors import ConfigError
from fedlm.privacy.mechanisms.banded import Banded, best_band
from fedlm.privacy.mechanisms.base import Mechanism, Participation, RoundNoise
from fedlm.privacy.mechanisms.blt import Blt
from fedlm.privacy.mechanisms.gaussian import Gaussian
from fedlm.privacy.mechanisms.local import Local
from fedlm.privacy.mechanisms.skellam import DistributedSkellam
from fedlm.privacy.mechanisms.tree import Tree
from fedlm.privacy.ranges import require_count, require_number

__all__ = ["NAMES", "SAMPLERS", "Mechanism", "Participation", "RoundNoise", "create"]

_CLASSES: dict[str, type[Gaussian | Blt | Banded | Tree | Local]] = {
    kind.name: kind for kind in (Gaussian, Blt, Banded, Tree, Local)
}
NAMES = tuple(_CLASSES)
"""Mechanisms whose noise the server adds; beside them there is "skellam"."""
SAMPLERS = {kind.name: kind.samplers for kind in (*_CLASSES.values(), DistributedSkellam)}
"""Samplers of each mechanism, the default first."""


def create(
    name: str,
    participation: Participation,
    *,
    delta: float,
    epsilon: float = 0.0,
    noise_multiplier: float = 0.0,
    bands: int = 0,
    buffers: int = 2,
    max_bands: int = 0,
    size: int = 0,
    grid_bits: int = 16,
    min_survivors: int = 0,
) -> Mechanism:
    """Return the mechanism of a run, its matrix chosen for the participation rule.

    Arguments:
        name: One of `SAMPLERS`.
        participation: Its sampler is one of `SAMPLERS[name]`. "cyclic_poisson" with separation 1 leaves the number of
            classes to the number of bands.
        delta, epsilon: The target, which decides the best band under cyclic Poisson sampling.
        noise_multiplier: z where epsilon is not given; no matrix depends on it.
        bands: Of "banded"; 0: the best (`best_band`).
        buffers: Of "blt".
        max_bands: The most that `bands` = 0 may choose; 0: no limit.
        size, grid_bits, min_survivors: Of "skellam"; the first has to be given.

    Raises:
        ConfigError: An impossible combination.
    """
    if name not in SAMPLERS:
        raise ConfigError(f"privacy.mechanism = {name!r} is not built in; use one of {', '.join(SAMPLERS)}")
    require_count("privacy.bands", bands)
    if name == "banded":
        if bands:
            return _with_bands(participation, bands)
        _require_epsilon(participation, epsilon, noise_multiplier)
        return best_band(participation, epsilon=epsilon, delta=delta, max_bands=max_bands)
    if bands:
        raise ConfigError(f"privacy.bands = {bands} has no meaning for privacy.mechanism = {name!r}; set it to 0")
    if name == "blt":
        return Blt.optimised(participation, buffers=buffers)
    if name == DistributedSkellam.name:
        return DistributedSkellam.planned(
            participation, size=size, grid_bits=grid_bits, min_survivors=min_survivors, delta=delta
        )
    kinds: dict[str, type[Gaussian | Tree | Local]] = {"gaussian": Gaussian, "tree": Tree, "local": Local}
    return kinds[name](participation)


def _classes_open(rule: Participation) -> bool:
    return rule.sampler == "cyclic_poisson" and rule.separation == 1


def _with_bands(rule: Participation, bands: int) -> Banded:
    return Banded(replace(rule, separation=bands) if _classes_open(rule) else rule, bands)


def _require_epsilon(rule: Participation, epsilon: float, noise_multiplier: float) -> None:
    if not _classes_open(rule):
        return
    if noise_multiplier and not epsilon:
        raise ConfigError(
            f"privacy.bands = 0 with privacy.noise_multiplier = {noise_multiplier}: the best is that for an epsilon; "
            "set privacy.bands, or privacy.epsilon in place of the noise multiplier"
        )
    require_number("privacy.epsilon", epsilon, above=0)
