"""From the section [privacy] to the mechanism of a run and its noise multiplier."""

from __future__ import annotations

from fedlm.config.schema import PrivacyConfig
from fedlm.errors import ConfigError
from fedlm.privacy import mechanisms
from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.privacy.mechanisms.base import Mechanism
from fedlm.privacy.sampling.cohorts import participation_rule
from fedlm.ranges import require_number
from fedlm.registry import COHORT_SAMPLERS, MECHANISMS


def mechanism_of(
    config: PrivacyConfig, rounds: int, population: int, cohort: int, fleet_rounds: int, size: int
) -> Mechanism:
    """Return the mechanism that a config names, for the accounted fleet.

    Arguments:
        config: The section [privacy].
        rounds: T.
        population, cohort: As accounted.
        fleet_rounds: Rounds after which a device of the simulated fleet comes again, where devices take turns.
        size: The most coordinates of a round; for Skellam noise.

    Raises:
        ConfigError: A combination that nobody can account for.
    """
    sampler = config.sampler or MECHANISMS.resolve(config.mechanism).samplers[0]
    kind, separation = COHORT_SAMPLERS.resolve(sampler), config.min_separation
    if kind.accounted_as != "separated" and (separation or config.max_participations):
        raise ConfigError(
            f"privacy.min_separation = {separation} and privacy.max_participations = {config.max_participations} are "
            f"for devices that take turns, but the sampler is {sampler!r}; set privacy.sampler = 'separated', or both "
            "to 0"
        )
    rule = participation_rule(
        sampler,
        population=population,
        cohort=cohort,
        rounds=rounds,
        cap=config.cap if kind.takes_cap else 0,
        min_separation=separation,
        max_participations=config.max_participations,
        most_apart=fleet_rounds,
    )
    return mechanisms.create(
        config.mechanism,
        rule,
        delta=config.delta,
        epsilon=config.epsilon,
        noise_multiplier=config.noise_multiplier,
        most_apart=fleet_rounds,
        size=size,
        **config.options,
    )


def noise_multiplier_of(config: PrivacyConfig, mechanism: Mechanism) -> float:
    """Return z as given, or calibrated to epsilon.

    Raises:
        ConfigError: Neither is given, or a number out of range.
    """
    if config.noise_multiplier:
        return require_number("privacy.noise_multiplier", config.noise_multiplier, above=0)
    if not config.epsilon:
        raise ConfigError("privacy.epsilon = 0 and privacy.noise_multiplier = 0; give one of them")
    require_number("privacy.delta", config.delta, low=subsampled_gaussian.MIN_DELTA, high=0.1)
    return mechanism.noise_multiplier(epsilon=config.epsilon, delta=config.delta)
