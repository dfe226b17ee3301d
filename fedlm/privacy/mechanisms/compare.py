"""Choose your mechanism: what each costs in noise at the same epsilon, and what it asks of a fleet.

A row's figure of merit is the root mean square, over all rounds, of the noise in one coordinate of the *prefix sums* of
the releases, in clip norms: it is where the model is, up to the server's learning rate. Noise multipliers of different
mechanisms cannot be compared with each other, for correlated noise takes back later what it added earlier.

Exact: each row is the mechanism that a run would use, calibrated by its own accounting. Which number of bands is best
under sampling is found without calibrating each: at one level of noise, the best band is that of least epsilon, so a
candidate is compared by one epsilon and only the winner is calibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from fedlm.privacy import mechanisms
from fedlm.privacy.mechanisms import Mechanism, Participation
from fedlm.privacy.mechanisms.banded import Banded, best_band
from fedlm.ranges import require_count, require_number

EPSILONS = (1.0, 2.0, 4.0, 8.0)
"""What is compared unless someone asks for others."""
_POISSON = "each device flips its own coin each round, in secret"
_CYCLIC = "classes in turn, in a class each device flips its own coin, in secret"
_SEPARATED = "none but the separation"
_TOLERANCE = 2e-4
"""Of a calibration."""
_GROWTH = 0.4


@dataclass(frozen=True)
class Row:
    """One mechanism at one epsilon.

    Arguments:
        epsilon: The target.
        mechanism: Its name and parameters.
        noise_multiplier: z, calibrated.
        noise_in_mean: z / n in clip norms: what independent noise adds to each coordinate of a round's mean.
        prefix_rmse: RMS noise of a coordinate of the prefix sums, in clip norms.
        sampling: What the guarantee assumes about sampling, in words.
        num_vectors: Vectors of earlier noise that the server keeps.
        needs_ledger: Whether participations have to be counted for each user.
        real_fleet: Whether devices that come when they can, and that the server knows, can do it.
    """

    epsilon: float
    mechanism: str
    noise_multiplier: float
    noise_in_mean: float
    prefix_rmse: float
    sampling: str
    num_vectors: int
    needs_ledger: bool
    real_fleet: bool


@dataclass(frozen=True)
class _Candidate:
    label: str
    sampling: str
    at_epsilon: Callable[[float], Mechanism]
    real_fleet: bool


def compare(
    *,
    population: int,
    cohort: int,
    rounds: int,
    delta: float,
    epsilons: Sequence[float],
    separation: int = 0,
    max_vectors: int = 0,
) -> list[Row]:
    """Return a row for each epsilon and each mechanism, in this order.

    Arguments:
        population, cohort, rounds: N, n, T.
        delta: Of every guarantee.
        epsilons: Targets, each > 0.
        separation: b of the mechanisms that need one; 0: the largest that the fleet allows, N / n.
        max_vectors: Most vectors of earlier noise that banded noise may keep; 0: no limit. The others take few.

    Raises:
        ConfigError: A number out of range.
    """
    require_count("cohort", cohort, low=1, high=require_count("population", population, low=1))
    require_count("rounds", rounds, low=1)
    require_count("separation", separation, high=population // cohort, fix="lower the cohort")
    for epsilon in epsilons:
        require_number("epsilon", epsilon, above=0)
    apart = separation or min(population // cohort, rounds)
    apart_rule = Participation("separated", population, cohort, rounds, 0, apart, -(-rounds // apart))
    candidates = _candidates(apart_rule, delta, max_vectors)
    return [_row(candidate, epsilon, delta) for epsilon in epsilons for candidate in candidates]


def best(rows: Sequence[Row], *, real_fleet: bool) -> Row:
    """Return the row with the least prefix RMSE, among those that a real fleet can do or among all."""
    return min((row for row in rows if row.real_fleet or not real_fleet), key=lambda row: row.prefix_rmse)


def advice(rows: Sequence[Row]) -> list[str]:
    """Return a recommendation for each epsilon, a sentence each."""
    sentences = []
    for epsilon in dict.fromkeys(row.epsilon for row in rows):
        same = [row for row in rows if row.epsilon == epsilon]
        fleet, simulation = best(same, real_fleet=True), best(same, real_fleet=False)
        sentences.append(
            f"epsilon {epsilon:g}: {fleet.mechanism} for a real fleet (RMSE {fleet.prefix_rmse:.3g}), "
            f"{simulation.mechanism} in a simulation (RMSE {simulation.prefix_rmse:.3g})"
        )
    return sentences


def _candidates(apart: Participation, delta: float, max_vectors: int) -> list[_Candidate]:
    most_bands = max_vectors + 1 if max_vectors else 0
    poisson = Participation("poisson", apart.population, apart.cohort, apart.rounds, 0, 1, apart.rounds)
    cyclic = Participation("cyclic_poisson", apart.population, apart.cohort, apart.rounds, 0, 1, apart.rounds)

    def fixed(name: str, rule: Participation, **options: int) -> Callable[[float], Mechanism]:
        made = mechanisms.create(name, rule, delta=delta, noise_multiplier=1.0, **options)
        return lambda _: made

    banded = best_band(apart, epsilon=0.0, delta=delta, max_bands=most_bands)
    return [
        _Candidate("gaussian, Poisson cohorts", _POISSON, fixed("gaussian", poisson), real_fleet=False),
        _Candidate(
            "banded, cyclic Poisson cohorts",
            _CYCLIC,
            _BandSearch(cyclic, delta, most_bands).at_epsilon,
            real_fleet=False,
        ),
        _Candidate("blt", _SEPARATED, fixed("blt", apart, buffers=2), real_fleet=True),
        _Candidate("blt", _SEPARATED, fixed("blt", apart, buffers=3), real_fleet=True),
        _Candidate("banded", _SEPARATED, lambda _: banded, real_fleet=True),
        _Candidate("tree", _SEPARATED, fixed("tree", apart), real_fleet=True),
        _Candidate("gaussian", _SEPARATED, fixed("gaussian", apart), real_fleet=True),
        _Candidate("local", _SEPARATED, fixed("local", apart), real_fleet=True),
    ]


class _BandSearch:
    """Finds what `best_band` finds for cyclic Poisson sampling, with few calibrations; fastest for ascending epsilons.

    Arguments:
        rule: Sampler "cyclic_poisson", the number of classes open.
        delta: Of the guarantee.
        max_bands: The most to choose from; 0: no limit.
    """

    def __init__(self, rule: Participation, delta: float, max_bands: int) -> None:
        most = min(rule.population // rule.cohort, rule.rounds, max_bands or rule.rounds)
        powers = (2**power for power in range(most.bit_length()))
        sizes = [*(bands for bands in powers if 2 * bands <= most), most]
        self._plans = [Banded(replace(rule, separation=bands), bands) for bands in sizes]
        self._delta, self._place, self._gain, self._last = delta, len(sizes) // 2, 1.0, 1.0
        self._spent = cache(self._epsilon)

    def at_epsilon(self, epsilon: float) -> Banded:
        """Return the plan of least prefix RMSE at an epsilon, up to the tolerance of a calibration."""
        independent = self._level(0, epsilon)
        # The gain over independent noise grows about like this; a bad guess costs time alone.
        guess = min(self._gain * (self._last / epsilon) ** _GROWTH, 1.0) * independent
        place = self._least(self._place, guess)
        level = self._level(place, epsilon)
        while (better := self._better(place, level, epsilon)) is not None:
            place, level = better, self._level(better, epsilon)
        self._place, self._gain, self._last = place, level / independent, epsilon
        return self._plans[place]

    def _level(self, place: int, epsilon: float) -> float:
        """Return the prefix RMSE at an epsilon."""
        plan = self._plans[place]
        return plan.noise_multiplier(epsilon=epsilon, delta=self._delta) * plan.prefix_rmse()

    def _epsilon(self, place: int, level: float) -> float:
        """Return the epsilon at which a plan has this prefix RMSE."""
        plan = self._plans[place]
        z = level / plan.prefix_rmse()
        return plan.epsilon(noise_multiplier=z, num_releases=plan.participation.rounds, delta=self._delta)

    def _least(self, place: int, level: float) -> int:
        """Return the place of least epsilon at a level, downhill from `place`; there is one valley."""
        for step in (1, -1):
            start = place
            while 0 <= place + step < len(self._plans) and self._spent(place + step, level) < self._spent(place, level):
                place += step
            if place != start:
                break
        return place

    def _better(self, place: int, level: float, epsilon: float) -> int | None:
        """Return a neighbour, or the largest plan, that spends less at this level; None: none does."""
        for other in sorted({place - 1, place + 1, len(self._plans) - 1} - {place, -1, len(self._plans)}):
            if self._spent(other, level) < epsilon * (1 - _TOLERANCE):
                return other
        return None


def _row(candidate: _Candidate, epsilon: float, delta: float) -> Row:
    mechanism = candidate.at_epsilon(epsilon)
    z, cohort = mechanism.noise_multiplier(epsilon=epsilon, delta=delta), mechanism.participation.cohort
    parameters = mechanism.parameters
    return Row(
        epsilon=epsilon,
        mechanism=f"{candidate.label} ({parameters})" if parameters else candidate.label,
        noise_multiplier=z,
        noise_in_mean=z * mechanism.noise_growth(cohort) / cohort,
        prefix_rmse=z * mechanism.prefix_rmse(),
        sampling=candidate.sampling,
        num_vectors=mechanism.num_vectors,
        needs_ledger=mechanism.participation.sampler == "separated",
        real_fleet=candidate.real_fleet,
    )
