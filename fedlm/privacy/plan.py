"""The privacy plan: sampler, clipper, mechanism and accounting of one experiment, made together or not at
all.

One release is `sum of clipped updates / n + N(0, (z C / n)^2)`: the Gaussian mechanism on a Poisson-sampled
cohort (DP-FedAvg, McMahan et al. 2018, https://arxiv.org/abs/1710.06963), n the *expected* cohort.
Everything that its guarantee rests on is fixed in one frozen object before the first round, from public
numbers alone.

A run stores `to_json()` once and resumes with `from_json`, which takes the noise multiplier as stored:
calibrating again could give another one under another version of the accountant. The text holds no secret;
the seed is passed in again from the configuration.
"""

from __future__ import annotations

import math
from dataclasses import InitVar, asdict, dataclass, field
from hashlib import blake2b
from threading import Lock
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from fedlm.config.schema import PrivacyConfig
from fedlm.errors import BudgetExceededError, ConfigError, DataError
from fedlm.privacy import accounting
from fedlm.privacy.clipping import FRACTION_BITS, ClippedSum, Clipper, FloatVector, IntVector
from fedlm.privacy.noise import MAX_STD, NoiseStream
from fedlm.privacy.ranges import require_count, require_number
from fedlm.privacy.statement import figures, stamps, statement
from fedlm.privacy.terms import PrivacyTerms
from fedlm.randomness import stream

_TOKEN = object()
_CHUNK = 65_536


class _Released:
    """The rounds that this process has released, so that no round is released twice; safe across threads."""

    def __init__(self) -> None:
        self._rounds: set[int] = set()
        self._lock = Lock()

    def claim(self, round_number: int, most: float) -> None:
        """Record the round before its noise is drawn; a failure afterwards still counts."""
        with self._lock:
            if round_number in self._rounds:
                raise BudgetExceededError(
                    f"round {round_number} was already released, its data may leave once; keep the vector"
                )
            if len(self._rounds) >= most:
                raise BudgetExceededError(f"all {most:,} planned rounds were released; plan more rounds at the start")
            self._rounds.add(round_number)


@dataclass(frozen=True)
class PrivacyPlan(PrivacyTerms):
    """The only way to sample, clip, sum and release; fields as in `PrivacyTerms`.

    Guarantee:
        The vectors returned by `release`, all T together, are (epsilon(T), delta)-differentially private
        with respect to adding or removing one user, if each device is added at most once a round and only in
        rounds whose cohort has it, the seed stays secret, and nothing else leaves.

    Edge cases:
        Dropouts and non-finite updates count as zero; an empty cohort releases noise; a sum or a round is
        released once; the release after the last planned one is refused.
    """

    seed: int = field(repr=False)
    _token: InitVar[object]
    _released: _Released = field(init=False, repr=False, compare=False, default_factory=_Released)

    def __post_init__(self, _token: object) -> None:
        """Check every number; the same checks serve `create` and `from_json`."""
        if _token is not _TOKEN:
            raise TypeError("PrivacyPlan cannot be built directly; use PrivacyPlan.create or from_json")
        require_count("seed", self.seed, fix="set seed")
        require_count("rounds", self.rounds, low=1)
        require_count("fleet_size", self.fleet_size, low=1, fix="the corpus needs at least one training user")
        most = min(self.fleet_size, _largest_cohort(self.clipper.capacity))
        require_count("fleet.cohort", self.cohort, low=1, high=most, fix="lower fleet.cohort or add devices")
        require_count("privacy.population", self.population, low=1)
        fix = "raise privacy.population"
        require_count("privacy.expected_cohort", self.expected_cohort, low=1, high=self.population, fix=fix)
        require_number("privacy.delta", self.delta, low=accounting.MIN_DELTA, high=0.1)
        require_number("privacy.epsilon", self.epsilon_target, low=0)
        if self.mechanism != "gaussian":
            raise ConfigError(f"privacy.mechanism = {self.mechanism!r} is not built in; use 'gaussian'")
        if self.enabled != (self.clip_norm < math.inf) or self.enabled != (self.noise_multiplier > 0):
            raise ConfigError(
                f"clip norm {self.clip_norm} and noise multiplier {self.noise_multiplier} contradict "
                f"privacy.enabled = {self.enabled}; make the plan with PrivacyPlan.create"
            )
        if self.enabled:
            most_z = MAX_STD / 2.0**FRACTION_BITS * self.expected_cohort / self.cohort
            require_number("noise multiplier", self.noise_multiplier, above=0, high=most_z, fix="raise epsilon")

    @classmethod
    def create(cls, config: PrivacyConfig, *, rounds: int, fleet_size: int, cohort: int, seed: int) -> PrivacyPlan:
        """Return the plan of an experiment; the noise multiplier is calibrated to epsilon unless it is given.

        Arguments:
            config: The section [privacy].
            rounds: T, how many releases there will be.
            fleet_size: Devices that can be sampled.
            cohort: Expected devices a round.
            seed: The experiment's; it decides the cohorts.

        Raises:
            ConfigError: A number out of range, or neither epsilon nor noise multiplier.
            BudgetExceededError: Both are given and `rounds` releases cost more than epsilon.
        """
        terms = PrivacyTerms(
            enabled=config.enabled,
            clip_norm=float(config.clip_norm) if config.enabled else math.inf,
            noise_multiplier=_noise_multiplier(config, rounds, fleet_size, cohort) if config.enabled else 0.0,
            epsilon_target=float(config.epsilon) if config.enabled else 0.0,
            rounds=rounds,
            delta=float(config.delta),
            population=config.population or fleet_size,
            expected_cohort=config.expected_cohort or cohort,
            fleet_size=fleet_size,
            cohort=cohort,
            reproducible_noise=config.reproducible_noise,
            mechanism=config.mechanism,
        )
        return cls(**asdict(terms), seed=seed, _token=_TOKEN)._within_budget()

    @classmethod
    def from_json(cls, text: str, *, seed: int) -> PrivacyPlan:
        """Return the plan that `to_json` stored, bit for bit.

        Raises:
            DataError: Not the text of a plan.
            ConfigError: A number out of range.
            BudgetExceededError: Its noise does not keep its own budget.
        """
        return cls(**cls.parse(text), seed=seed, _token=_TOKEN)._within_budget()

    @property
    def clipper(self) -> Clipper:
        """What a node needs to clip and to sum: no seed, no noise; picklable."""
        return Clipper(self.clip_norm)

    def sample_cohort(self, round_number: int) -> npt.NDArray[np.int64]:
        """Return the sorted ids of the devices in a round's cohort.

        Device d joins if the d-th coin of the round falls below cohort / fleet_size: independent of
        all other devices and rounds, and reproducible from the seed, which must therefore stay secret.

        Returns:
            (realised cohort,) int64; possibly empty.
        """
        require_count("round", round_number, high=self.rounds)
        # Not from `round_key`: sampled devices hold that one, and could compute who else was sampled.
        key = blake2b(f"{self.seed}/cohorts".encode(), digest_size=32).digest()
        coins = stream(key, "cohort", round_number).random(self.fleet_size)  # (fleet,)
        return np.flatnonzero(coins < self.cohort / self.fleet_size).astype(np.int64)

    def new_sum(self, size: int) -> ClippedSum:
        """Return an empty sum of `size` coordinates for this plan's clip norm."""
        return self.clipper.new_sum(size)

    def sum_from_arrays(self, vector: IntVector, fields: dict[str, int | float]) -> ClippedSum:
        """Return a sum that came over the wire, checked against this plan; see `ClippedSum.from_arrays`."""
        return self.clipper.sum_from_arrays(vector, fields)

    def release(self, total: ClippedSum, round_number: int) -> FloatVector:
        """Return the noised mean update of a round: the only data of the devices that may leave.

        Arguments:
            total: The sum over all devices of the round that reported; emptied by this call.
            round_number: In 0..rounds; each once.

        Returns:
            (P,) fp32: total / cohort + N(0, (z C / expected_cohort)^2); without noise when not enabled.

        Raises:
            DataError: Not a sum of this plan, or of more devices than the round's cohort has.
            BudgetExceededError: The round, the sum or all planned releases are already spent.
        """
        if type(total) is not ClippedSum or total.clip_norm != self.clip_norm:
            found = getattr(total, "clip_norm", type(total).__name__)
            raise DataError(f"cannot release {found}; give a sum made by this plan (clip norm {self.clip_norm})")
        sampled = self.sample_cohort(round_number).size
        if total.num_devices > sampled:
            raise DataError(
                f"sum of {total.num_devices:,} devices, but round {round_number} sampled {sampled:,}; "
                "a device was added twice or uninvited"
            )
        total._live()
        self._released.claim(round_number, self.rounds if self.enabled else math.inf)
        vector = total._take()  # (P,) int64
        if self.enabled:
            std = self.noise_multiplier * 2.0**FRACTION_BITS * (self.cohort / self.expected_cohort)
            self._noise(round_number).add_to(vector, std)
        return _scaled(vector, self.clipper.unit / self.cohort)

    def check_release(self, num_releases_so_far: int) -> None:
        """Raise `BudgetExceededError` if one more release would go beyond the T that are paid for."""
        done = require_count("num_releases_so_far", num_releases_so_far)
        if self.enabled and done >= self.rounds:
            raise BudgetExceededError(
                f"{done:,} releases were made, {self.rounds:,} are paid for "
                f"(epsilon {self.epsilon(self.rounds):.4g}); start a new run with more rounds"
            )

    def stamps(self) -> tuple[str, ...]:
        """Return the warnings that every report of this run carries; see `fedlm.privacy.statement`."""
        return stamps(self)

    def statement(self) -> str:
        """Return the guarantee in words, with every figure it rests on, and the stamps."""
        return statement(self)

    def figures(self) -> dict[str, object]:
        """Return the guarantee as JSON-ready figures; an infinite epsilon or clip norm is None."""
        return figures(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse pickling and copying: a copy would release rounds again, and the plan holds the seed."""
        raise TypeError("PrivacyPlan is neither pickled nor copied; send plan.clipper to nodes, store plan.to_json()")

    def _noise(self, round_number: int) -> NoiseStream:
        if self.reproducible_noise:
            return NoiseStream.reproducible(self.seed, round_number)
        return NoiseStream.from_system()

    def _within_budget(self) -> PrivacyPlan:
        """Return the plan if its T releases cost at most its epsilon."""
        if self.enabled and self.epsilon_target:
            spent = self.epsilon(self.rounds)
            # Another version of the accountant may round otherwise in the fourth digit.
            if spent > self.epsilon_target * (1 + 1e-4):
                raise BudgetExceededError(
                    f"noise multiplier {self.noise_multiplier:.4g} over {self.rounds:,} rounds costs epsilon "
                    f"{spent:.4g}, allowed is {self.epsilon_target:.4g}; set privacy.noise_multiplier = 0 to "
                    "calibrate it, or privacy.epsilon = 0 to accept the cost"
                )
        return self


def _noise_multiplier(config: PrivacyConfig, rounds: int, fleet_size: int, cohort: int) -> float:
    """Return z as given or calibrated."""
    if config.noise_multiplier:
        return require_number("privacy.noise_multiplier", config.noise_multiplier, above=0)
    if not config.epsilon:
        raise ConfigError("privacy.epsilon = 0 and privacy.noise_multiplier = 0; give one of them")
    population, expected = config.population or fleet_size, config.expected_cohort or cohort
    require_count("fleet.cohort", cohort, low=1, high=fleet_size, fix="lower fleet.cohort or add devices")
    require_count("privacy.expected_cohort", expected, low=1, high=population, fix="raise privacy.population")
    return accounting.noise_multiplier(
        sampling_probability=expected / population, rounds=rounds, epsilon=config.epsilon, delta=config.delta
    )


def _largest_cohort(capacity: int) -> int:
    """Return the expected cohort whose realised size exceeds `capacity` with probability below 1e-20."""
    return math.floor(capacity - 10 * math.sqrt(capacity))


def _scaled(vector: IntVector, factor: float) -> FloatVector:
    """Return `vector * factor` (P,) as fp32, computed in fp64 without a second full-size array."""
    result = np.empty(vector.size, np.float32)
    for start in range(0, vector.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        np.multiply(vector[part], factor, out=result[part], dtype=np.float64, casting="unsafe")
    return result
