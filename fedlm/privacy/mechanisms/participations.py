"""What follows from a participation rule alone: who may be combined with whom, how often a user can come, in words."""

from __future__ import annotations

from fedlm.errors import ConfigError
from fedlm.privacy.mechanisms.base import Participation
from fedlm.ranges import require_count
from fedlm.registry import COHORT_SAMPLERS

ADD_OR_REMOVE = "add or remove one user"
ZERO_OUT = "one user's contributions replaced by zero"
_POPULATION = "lower privacy.expected_cohort or raise privacy.population"


def check(rule: Participation, mechanism: str, samplers: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless the rule is possible and its sampler one of those that the mechanism takes."""
    kind = COHORT_SAMPLERS.resolve(rule.sampler)
    if kind.accounted_as not in samplers:
        raise ConfigError(
            f"privacy.sampler = {rule.sampler!r} does not go with privacy.mechanism = {mechanism!r}; "
            f"it takes {', '.join(samplers)}"
        )
    require_count("privacy.population", rule.population, low=1)
    require_count("privacy.expected_cohort", rule.cohort, low=1, high=rule.population, fix="raise privacy.population")
    require_count("rounds", rule.rounds, low=1)
    require_count("privacy.min_separation", rule.separation, low=1, high=rule.rounds, fix="it is in rounds")
    require_count("privacy.max_participations", rule.max_participations, high=rule.rounds, fix="0 sets no limit")
    require_count("cap of the cohort", rule.cap, low=int(kind.takes_cap))
    most = rule.population // rule.cohort
    if kind.keeps_separation:
        require_count("privacy.min_separation", rule.separation, high=most, fix=_POPULATION)
    elif rule.separation != 1:
        raise ConfigError(
            f"privacy.min_separation = {rule.separation:,} is not kept by privacy.sampler = {rule.sampler!r}; "
            "set it to 1 or take the sampler 'separated'"
        )
    if kind.accounted_as == "separated" and rule.max_participations:
        # The sampler takes its slots in turn, so that every user comes this often.
        fix = "raise it, plan fewer rounds or lower privacy.expected_cohort"
        require_count("privacy.max_participations", rule.max_participations, low=-(-rule.rounds // most), fix=fix)


def most_participations(rule: Participation, num_releases: int, separation: int = 0, at_most: int = 0) -> int:
    """Return the most of the first `num_releases` rounds that one user can be in.

    Arguments:
        rule: Gives separation and limit where the next two are 0.
        num_releases: t.
        separation: b; a user comes at most once in any b consecutive rounds.
        at_most: k; a limit beside it.
    """
    limit = at_most or rule.max_participations or rule.rounds
    return min(limit, -(-num_releases // (separation or rule.separation)))


def sampling_clause(rule: Participation) -> str:
    """Return the sampling in words, for the statement of the guarantee."""
    clause: str = COHORT_SAMPLERS.resolve(rule.sampler).clause(rule, most_participations(rule, rule.rounds))
    return clause
