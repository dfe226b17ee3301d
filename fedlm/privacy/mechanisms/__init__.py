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

from typing import Any

from fedlm.config.keys import typed_options
from fedlm.privacy.mechanisms.base import Mechanism, Participation, Request, RoundNoise
from fedlm.registry import MECHANISMS

__all__ = ["Mechanism", "Participation", "Request", "RoundNoise", "create"]


def create(
    name: str,
    participation: Participation,
    *,
    delta: float,
    epsilon: float = 0.0,
    noise_multiplier: float = 0.0,
    most_apart: int = 0,
    size: int = 0,
    **options: Any,
) -> Mechanism:
    """Return the mechanism of a run, its matrix chosen for the participation rule.

    Arguments:
        name: Of `MECHANISMS`.
        participation: Its sampler is one of the mechanism's `samplers`.
        delta, epsilon, noise_multiplier, most_apart, size: As for `Request`.
        options: Those of the mechanism that are not to have their defaults.

    Raises:
        ConfigError: An impossible combination, or an option that the mechanism does not have.
    """
    kind = MECHANISMS.resolve(name)
    typed = typed_options(kind, options, MECHANISMS.options_key)
    request = Request(delta, epsilon, noise_multiplier, typed, most_apart, size)
    made: Mechanism = kind.planned(participation, request)
    return made
