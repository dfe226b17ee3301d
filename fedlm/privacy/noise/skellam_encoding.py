"""Distributed noise for secure aggregation: the Skellam mechanism.

Agarwal, Kairouz and Liu 2021, "The Skellam mechanism for differentially private federated learning",
https://arxiv.org/abs/2110.04995. Each device rounds its clipped update to integers, adds Skellam noise (a difference of
two Poisson draws) of variance mu / D and reduces modulo 2^m. Skellam variances add up: only the sum is private.

    x_i = round(H S v_i 2^g / C),   sum_i (x_i + Skellam(mu / D)) mod 2^m,   mu = (z 2^g)^2
    D_alpha <= alpha L2^2 / 2 mu + min(((2 alpha - 1) L2^2 + 6 L1) / 4 mu^2, 3 L1 / 2 mu)       (theorem 3.5)

Random signs S and a Walsh-Hadamard rotation H make the coordinates flat, which saves bits. Rounding up or down is
random and unbiased, and repeated until the integer norm keeps a public bound (conditional rounding; Kairouz, Liu and
Steinke 2021, proposition 22, https://arxiv.org/abs/2102.06387).

Exact: L2 and L1 sensitivity, checked on each integer vector; the modular arithmetic. Bounds from above: the Renyi
divergence, the sampling theorem of `fedlm.privacy.accounting.rdp`, the probability to wrap. Approximate: Poisson draws
are numpy's own, whose law is right to about 1e-5 at the largest variance allowed; repeated rounding leaves a bias far
below the grid.

A device sends `bits` a coordinate, of which there are `padded_size`.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
from randomgen import AESCounter

from fedlm.codec import coded
from fedlm.errors import ConfigError, DataError
from fedlm.privacy.accounting import rdp
from fedlm.privacy.noise.fixed_point import FRACTION_BITS, IntVector
from fedlm.randomness import seed_key, stream
from fedlm.ranges import require_count, require_number

WRAP_PROBABILITY = 1e-9
"""Most that a coordinate of any of the rounds wraps; a wrap spoils the round, not the privacy."""

_ATTEMPTS = 8
_ROUNDING = 4.0  # a rounding breaks the norm bound with probability below e^-4
_MAX_BLOCK = 2**14
# Beyond, the acceptance test of numpy's Poisson sampler feels the rounding of fp64.
_MAX_STD = 2.0**18
_KEY = re.compile("([0-9a-f]{32})?")
LEAST_NOISE = 2.0**-4
# Cohorts beyond `max_devices` are cut; that they are not Poisson then is paid from delta.
_CUT_SHARE = 1e-9

Words = npt.NDArray[np.uint64]
Doubles = npt.NDArray[np.float64]


def system_generator() -> np.random.Generator:
    """Return a generator under a fresh 128-bit key of the operating system, for noise that nobody can repeat."""
    return np.random.Generator(AESCounter(key=secrets.randbits(128)))


def skellam_curve(l2_squared: int, l1: int, variance: float) -> rdp.Curve:
    """Return the Renyi divergence of one Skellam release at `rdp.ORDERS`, (orders,).

    Arguments:
        l2_squared, l1: Sensitivities of the integer vector.
        variance: mu of a coordinate.
    """
    second = np.minimum(
        ((2 * rdp.ORDERS - 1) * l2_squared + 6 * l1) / (4 * variance * variance), 3 * l1 / (2 * variance)
    )
    return rdp.ORDERS * l2_squared / (2 * variance) + second


@coded
@dataclass(frozen=True)
class Skellam:
    """A design: public numbers that devices, server and accountant share; made by `create`.

    Guarantee:
        Against an analyst who sees every `decode`: `epsilon_analyst`, add or remove one user, with Poisson-sampled
        cohorts that stay secret. Against a server that follows the protocol and knows the cohorts: `epsilon_server`,
        one user's updates replaced by zero (its device still takes part and adds noise), no amplification.

    Edge cases:
        * Fewer survivors than `max_devices`: `decode` adds the missing noise, so that the analyst's figure and the law
          of the release do not depend on who takes part.
        * Fewer survivors than `min_survivors`: released all the same, a round never fails for want of devices; but who
          saw their sum before `decode` saw less noise than `epsilon_server` counts on. Keeping that sum masked is the
          transport's part; `decode` then takes 0 devices and releases noise alone, and if that can hinge on one user,
          the analyst's figure does not cover it.
        * More sampled devices than `max_devices`: the cohort is to be cut, by public numbers; that is paid from delta.
        * c devices that collude with the server know their own noise: accept c survivors more to keep its figure.
    """

    size: int
    population: int
    cohort: int
    rounds: int
    delta: float
    noise_multiplier: float
    grid_bits: int
    min_survivors: int
    max_devices: int
    max_participations: int
    replace_one: bool
    rotation_seed: int | None
    debug_key: str = ""
    """Hexadecimal; devices draw from it and their vector instead of from the operating system: NOT PRIVATE."""

    def __post_init__(self) -> None:
        """Check every number; who got a design over the wire relies on it."""
        require_count("population", self.population, low=1)
        require_count("cohort", self.cohort, low=1, high=self.population)
        require_count("rounds", self.rounds, low=1)
        require_number("delta", self.delta, above=0, below=1)
        require_count("size", self.size, low=1)
        require_count("grid_bits", self.grid_bits, low=4, high=18)
        require_count("max_devices", self.max_devices, low=self.cohort, high=self.population)
        require_count("min_survivors", self.min_survivors, low=1, high=self.max_devices)
        require_count("max_participations", self.max_participations, low=1, high=self.rounds)
        z, most = self.noise_multiplier, _MAX_STD / 2**self.grid_bits
        require_number("noise_multiplier", z, low=LEAST_NOISE, high=most, fix="choose grid_bits for it")
        if not _KEY.fullmatch(self.debug_key):
            raise ConfigError(f"debug_key of {len(self.debug_key)} characters must be empty or 32 hexadecimal digits")

    @classmethod
    def create(
        cls,
        *,
        size: int,
        population: int,
        cohort: int,
        rounds: int,
        delta: float,
        min_survivors: int,
        noise_multiplier: float = 0.0,
        epsilon: float = 0.0,
        grid_bits: int = 16,
        max_participations: int = 0,
        replace_one: bool = False,
        rotation_seed: int | None = 0,
    ) -> Skellam:
        """Return the design for a noise multiplier, or for an epsilon against the analyst.

        Arguments:
            size: P, coordinates of an update.
            population, cohort, rounds: N, n, T.
            delta: Of both guarantees.
            min_survivors: Least devices whose sum the server gets to see.
            noise_multiplier: z, standard deviation of the released noise over the clip norm; or 0.
            epsilon: Calibrate z to it; or 0.
            grid_bits: g, the clip norm is 2^g steps of the grid.
            max_participations: Most rounds of one user, kept by a ledger, for the server's figure; 0: all.
            replace_one: Sensitivity 2 C: for transports with a fixed number of slots, where a user that leaves makes
                room for another one (also in the analyst's figure).
            rotation_seed: Public; None: no rotation (more bits, the update stays in place).

        Raises:
            ConfigError: A number out of range, or not exactly one of `noise_multiplier` and `epsilon`.
        """
        if (noise_multiplier > 0) == (epsilon > 0):
            raise ConfigError(
                f"noise_multiplier = {noise_multiplier} and epsilon = {epsilon}; give exactly one of them above 0"
            )
        require_count("population", population, low=1)
        require_count("cohort", cohort, low=1, high=population)
        require_count("rounds", rounds, low=1)
        require_number("delta", delta, above=0, below=1)

        def design(z: float) -> Skellam:
            return cls(
                size=size,
                population=population,
                cohort=cohort,
                rounds=rounds,
                delta=delta,
                noise_multiplier=z,
                grid_bits=grid_bits,
                min_survivors=min_survivors,
                max_devices=largest_cohort(population=population, cohort=cohort, rounds=rounds, delta=delta),
                max_participations=max_participations or rounds,
                replace_one=replace_one,
                rotation_seed=rotation_seed,
            )

        return design(
            noise_multiplier or least_noise(lambda z: design(z).epsilon_analyst <= epsilon, grid_bits=grid_bits)
        )

    @property
    def block(self) -> int:
        """Coordinates that are rotated together."""
        return 1 if self.rotation_seed is None else min(_MAX_BLOCK, 1 << (self.size - 1).bit_length())

    @property
    def padded_size(self) -> int:
        """Coordinates that travel: P filled up to whole blocks."""
        return -(-self.size // self.block) * self.block

    @property
    def variance(self) -> float:
        """mu, of a coordinate of the release, in grid steps squared."""
        return math.pow(self.noise_multiplier * 2**self.grid_bits, 2)

    @property
    def l2_squared(self) -> int:
        """Most squared norm of one device's integer vector."""
        norm, size = 2.0**self.grid_bits, self.padded_size
        likely = norm**2 + size / 4 + math.sqrt(2 * _ROUNDING) * (norm + math.sqrt(size) / 2)
        return math.ceil(min((norm + math.sqrt(size)) ** 2, likely))

    @property
    def l1(self) -> int:
        """Most sum of sizes of one device's integer vector."""
        return min(math.isqrt(self.l2_squared * self.padded_size), self.l2_squared)

    @cached_property
    def bits(self) -> int:
        """m: the sum of `max_devices` wraps in some round with probability below `WRAP_PROBABILITY`."""
        devices, peak = self.max_devices, 2**self.grid_bits
        odds = math.log(4 * self.padded_size * self.rounds / WRAP_PROBABILITY)
        # Hoeffding over the random signs for the signal, Bernstein for the noise, 1 for each device's rounding.
        signal = devices * peak * min(1.0, math.sqrt(2 * odds / self.block))
        noise = odds / 3 + math.sqrt(odds * odds / 9 + 2 * self.variance * odds)
        return math.ceil(math.log2(signal + noise + devices + 1)) + 1

    @property
    def num_bytes(self) -> int:
        """What a device sends: `bits` for each of `padded_size` coordinates."""
        return -(-self.padded_size * self.bits // 8)

    @cached_property
    def cut_probability(self) -> float:
        """At most: that in some round a user would be one too many, the others' coins alone deciding."""
        from scipy.stats import binom

        others = binom.sf(self.max_devices - 1, self.population - 1, self.cohort / self.population)
        return float(self.rounds * others)

    @cached_property
    def epsilon_server(self) -> float:
        """For who knows the cohorts and sees sums of `min_survivors` devices or more: no amplification."""
        return rdp.epsilon(
            self.max_participations * self.curve(self.variance * self.min_survivors / self.max_devices),
            delta=self.delta,
        )

    @cached_property
    def epsilon_analyst(self) -> float:
        """For who sees the releases alone: cohorts are Poisson-sampled and secret.

        Given the other users' coins, a user's own coin is as random as ever. Where those coins never fill a cohort, no
        cut tells the two worlds apart, and the sampled curve holds; the rest has `cut_probability`, paid from delta.
        """
        if self.cut_probability >= self.delta:
            raise ConfigError(
                f"max_devices = {self.max_devices:,} cuts a cohort with probability {self.cut_probability:.3g}, delta "
                f"is {self.delta:g}; raise max_devices"
            )
        sampled = rdp.poisson_sampled(self.curve(self.variance), self.cohort / self.population)
        return rdp.epsilon(self.rounds * sampled, delta=self.delta - self.cut_probability)

    def encode(self, vector: IntVector, generator: np.random.Generator) -> Words:
        """Return what a device hands to secure aggregation: rounded, noised, reduced modulo 2^m.

        Arguments:
            vector: (P,) int64, one device's clipped update in units of 2^-40 clip norms (`ClippedSum`).
            generator: `device_generator(vector)`; of the device alone.

        Returns:
            (padded size,) uint64 below 2^m.

        Raises:
            DataError: Wrong type or size, or a norm beyond the clip norm.
        """
        if type(vector) is not np.ndarray or vector.dtype != np.int64 or vector.shape != (self.size,):
            raise DataError(f"update must be an int64 vector of {self.size:,} coordinates; take it from a ClippedSum")
        flat = np.zeros(self.padded_size)  # (padded,)
        np.multiply(vector, 2.0 ** (self.grid_bits - FRACTION_BITS), out=flat[: self.size])
        rounded = self._round(self._rotate(flat), generator)
        rounded += _noise(self.variance / self.max_devices, rounded.size, generator)
        return rounded.view(np.uint64) & self.mask

    def device_generator(self, vector: IntVector) -> np.random.Generator:
        """Return the randomness of one device's encoding: `system_generator()` but for debugging.

        Edge cases:
            With a `debug_key` it follows from the key and the vector, so that a run repeats to the bit whichever
            worker does what; equal vectors then get equal noise.
        """
        if not self.debug_key:
            return system_generator()
        digest = blake2b(vector.tobytes(), key=bytes.fromhex(self.debug_key), digest_size=16).digest()
        return np.random.Generator(AESCounter(key=int.from_bytes(digest, "little")))

    def decode(self, total: Words, num_devices: int, generator: np.random.Generator) -> Doubles:
        """Return the release: the sum of the updates with noise of variance z^2, in clip norms, (P,).

        Arguments:
            total: (padded size,) uint64, the survivors' sum modulo 2^m; zeros for 0 devices.
            num_devices: Survivors.
            generator: `system_generator()`; the server adds the noise of the absent devices.

        Raises:
            DataError: Wrong type or size, or more devices than the design has.
        """
        if type(total) is not np.ndarray or total.dtype != np.uint64 or total.shape != (self.padded_size,):
            raise DataError(f"sum must be a uint64 vector of {self.padded_size:,} coordinates; sum what encode returns")
        if not 0 <= num_devices <= self.max_devices:
            raise DataError(f"sum of {num_devices:,} devices, allowed are 0 to {self.max_devices:,}; cut the cohort")
        half = np.uint64(2 ** (self.bits - 1))
        centred = ((total + half) & self.mask).view(np.int64) - half.view(np.int64)  # (padded,)
        if num_devices == 0:
            centred[:] = 0
        centred += _noise(self.variance * (1 - num_devices / self.max_devices), centred.size, generator)
        return self._rotate_back(centred.astype(np.float64))[: self.size] * 2.0**-self.grid_bits

    def check_sum(self, vector: IntVector, num_devices: int) -> None:
        """Refuse what cannot be a sum modulo 2^m of so many encodings; more nobody can see.

        Raises:
            DataError: A value out of range.
        """
        largest = int(self.mask) if num_devices else 0
        if vector.min() < 0 or vector.max() > largest:
            raise DataError(
                f"encoded sum of {num_devices:,} devices has values from {vector.min():,} to {vector.max():,}, "
                f"allowed are 0 to {largest:,}; reduce it by the round's modulus"
            )

    @property
    def mask(self) -> np.uint64:
        """2^m - 1: what a sum is reduced by."""
        return np.uint64(2**self.bits - 1)

    def curve(self, variance: float) -> rdp.Curve:
        """Return the Renyi divergence of one release without sampling, (orders,).

        Arguments:
            variance: Of the noise in the sum, in grid steps squared.
        """
        factor = 2 if self.replace_one else 1
        return skellam_curve(factor * factor * self.l2_squared, factor * self.l1, variance)

    def _round(self, values: Doubles, generator: np.random.Generator) -> IntVector:
        """Round up or down at random, within the norm bound; toward zero if chance refuses."""
        for _ in range(_ATTEMPTS):
            rounded = np.floor(values + generator.random(values.size))
            if self._fits(rounded):
                return rounded.astype(np.int64)
        rounded = np.trunc(values)
        if not self._fits(rounded):
            raise DataError(
                f"update has norm {np.linalg.norm(values) / 2**self.grid_bits:.6g} C, allowed is C; clip it"
            )
        return rounded.astype(np.int64)

    def _fits(self, rounded: Doubles) -> bool:
        # Squares of integers below 2^53 add up exactly in fp64, in any order.
        return float(np.dot(rounded, rounded)) <= self.l2_squared

    @cached_property
    def _signs(self) -> npt.NDArray[np.int8]:
        """The public signs (padded,), the same in every round and on every device."""
        generator = stream(seed_key(self.rotation_seed or 0), "skellam rotation")
        return generator.integers(0, 2, self.padded_size, np.int8) * np.int8(2) - np.int8(1)

    def _rotate(self, values: Doubles) -> Doubles:
        return values if self.rotation_seed is None else walsh_hadamard(values * self._signs, self.block)

    def _rotate_back(self, values: Doubles) -> Doubles:
        return values if self.rotation_seed is None else walsh_hadamard(values, self.block) * self._signs


def walsh_hadamard(values: Doubles, block: int) -> Doubles:
    """Return the orthonormal Walsh-Hadamard transform of each block of a vector; its own inverse.

    Arguments:
        values: (P,), P a multiple of `block`.
        block: A power of two.
    """
    result, width = values, 1
    while width < block:
        pairs = result.reshape(-1, 2, width)  # (P / 2 width, 2, width)
        result = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(-1)
        width *= 2
    return result / math.sqrt(block)


def _noise(variance: float, size: int, generator: np.random.Generator) -> IntVector:
    """Return (size,) Skellam draws with mean 0."""
    return generator.poisson(variance / 2, size) - generator.poisson(variance / 2, size)


@lru_cache(maxsize=64)
def largest_cohort(*, population: int, cohort: int, rounds: int, delta: float) -> int:
    """Return the largest Poisson-sampled cohort to be ready for: a larger one comes with a billionth of delta.

    Arguments:
        population, cohort, rounds, delta: N, n, T and that of the guarantee.
    """
    from scipy.stats import binom

    q, size, probability = cohort / population, cohort, _CUT_SHARE * delta / rounds
    while size < population and binom.sf(size - 1, population - 1, q) > probability:
        size += max(1, cohort // 100)
    return min(size, population)


def least_noise(fits: Callable[[float], bool], *, grid_bits: int) -> float:
    """Return the least noise multiplier, up to 0.1 %, that fits.

    Raises:
        ConfigError: None that the grid has room for does.
    """
    low, high = LEAST_NOISE, float(_MAX_STD / 2**grid_bits)
    if not fits(high):
        raise ConfigError(
            f"the most noise at grid_bits = {grid_bits}, multiplier {high:g}, costs more than epsilon; lower "
            "grid_bits, the number of rounds or the cohort, or raise epsilon"
        )
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
