"""Public row sets for Partial Embedding Updates (Xu et al. 2022, arXiv 2207.08988; METHODS.md section 1).

Round t draws one set S_t for the whole cohort, from public information only: the server's key of the round and public
word frequencies. A set chosen by a device from its own text would reveal its words.

Each way to draw is a class, `trainable.embedding_rows.sampler` names one (`fedlm.registry.ROW_SAMPLERS`):

    uniform   each row equally likely
    power     inclusion probability pi_r = min(1, c p_r^alpha), sum pi_r = count; systematic sampling, so |S_t| = count
    top_k     the most frequent rows, the same every round
    cyclic    a partition of the vocabulary: every row once in each cycle of ceil(V / count) rounds
    dp_adafest  power, until the rows that a noisy, paid map of the devices' words chose (`fedlm.privacy.adaptive.rule`)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedlm.config.built_in_options import DpAdafestOptions, PowerOptions
from fedlm.config.keys import typed_options
from fedlm.config.schema import Config, RowsConfig
from fedlm.errors import DataError
from fedlm.randomness import round_key, seed_key, stream
from fedlm.registry import ROW_SAMPLERS, NoOptions
from fedlm.trainable.spec import RowIds

Frequencies = npt.NDArray[np.float64]


class RowSampler(ABC):
    """A way to draw each round's row set, from public information alone.

    Arguments:
        options: An instance of the class's `Options`.
    """

    summary: ClassVar[str] = ""
    """The set in words."""
    Options: ClassVar[type] = NoOptions
    """What [trainable.embedding_rows.options] may hold: a frozen dataclass of `fedlm.config.schema.option` fields."""
    is_fixed: ClassVar[bool] = False
    """Whether every round has the same rows, which correlated noise needs."""
    selects: ClassVar[bool] = False
    """Whether rows are chosen by released word maps after `options.selection_rounds` rounds."""

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        """Yield what in a config cannot work with this sampler, one sentence each."""
        return iter(())

    @abstractmethod
    def draw(self, frequencies: Frequencies, count: int, *, seed: int, round_number: int) -> RowIds:
        """Return distinct row ids (S,) in any order.

        Arguments:
            frequencies: Public word frequencies (V,).
            count: Expected size of the set, in 1..V.
            seed: Of all row sets of the run; devices may know it.
            round_number: Counts from 1.
        """

    @abstractmethod
    def inclusion(self, frequencies: Frequencies, count: int) -> Frequencies:
        """Return the probability (V,) that a row is in the set of one round."""

    def received(self, frequencies: Frequencies, count: int, num_rounds: float) -> Frequencies:
        """Return the probability (V,) that a row is in one of the sets of `num_rounds` consecutive rounds."""
        return 1.0 - (1.0 - self.inclusion(frequencies, count)) ** num_rounds


class Uniform(RowSampler):
    """Each row equally likely."""

    summary = "each row equally likely"

    def draw(self, frequencies: Frequencies, count: int, *, seed: int, round_number: int) -> RowIds:
        """Return `count` rows without replacement."""
        rng = stream(round_key(seed, round_number), "rows")
        return rng.choice(len(frequencies), count, replace=False).astype(np.int64)

    def inclusion(self, frequencies: Frequencies, count: int) -> Frequencies:
        """Return count / V."""
        return np.full(len(frequencies), count / len(frequencies))


class Power(RowSampler):
    """Inclusion probability ~ frequency^alpha, by systematic sampling."""

    summary = "frequent words more often, by a power of their public frequency"
    Options: ClassVar[type] = PowerOptions

    def draw(self, frequencies: Frequencies, count: int, *, seed: int, round_number: int) -> RowIds:
        """Return `count` rows with the probabilities of `inclusion`."""
        return _systematic(self.inclusion(frequencies, count), stream(round_key(seed, round_number), "rows"))

    def inclusion(self, frequencies: Frequencies, count: int) -> Frequencies:
        """Return min(1, c p^alpha)."""
        return inclusion_probabilities(frequencies, self.options.alpha, count)


class TopK(RowSampler):
    """The most frequent rows, the same every round."""

    summary = "the most frequent words, the same in every round"
    is_fixed = True

    def draw(self, frequencies: Frequencies, count: int, *, seed: int, round_number: int) -> RowIds:
        """Return the `count` most frequent rows."""
        return np.argsort(-frequencies, kind="stable")[:count].astype(np.int64)

    def inclusion(self, frequencies: Frequencies, count: int) -> Frequencies:
        """Return one for these rows and zero for the others."""
        return (np.argsort(np.argsort(-frequencies, kind="stable")) < count).astype(np.float64)


class Cyclic(RowSampler):
    """A partition of the vocabulary: every row once in each cycle of ceil(V / count) rounds."""

    summary = "every row once in a cycle"

    def draw(self, frequencies: Frequencies, count: int, *, seed: int, round_number: int) -> RowIds:
        """Return the round's part; fewer than `count` rows where V is no multiple of it."""
        num_parts = -(-len(frequencies) // count)
        cycle, part = divmod(round_number - 1, num_parts)
        order = stream(seed_key(seed), "row_cycle", cycle).permutation(len(frequencies))
        return order[part * count : (part + 1) * count].astype(np.int64)

    def inclusion(self, frequencies: Frequencies, count: int) -> Frequencies:
        """Return count / V."""
        return np.full(len(frequencies), count / len(frequencies))

    def received(self, frequencies: Frequencies, count: int, num_rounds: float) -> Frequencies:
        """Return min(1, num_rounds count / V): no row comes again before every row."""
        return np.full(len(frequencies), min(1.0, num_rounds * count / len(frequencies)))


class DpAdafest(Power):
    """Power sampling at first, then the rows that a noisy, paid map of the devices' words chose."""

    summary = "by public frequency at first, then the rows that noisy maps of the devices' words chose"
    Options: ClassVar[type] = DpAdafestOptions
    selects = True

    @classmethod
    def problems(cls, config: Config) -> Iterator[str]:
        """Yield a run that ends before rows are chosen, and devices that do not noise their maps."""
        rows = config.trainable.embedding_rows
        if not rows.count:
            return
        rounds = typed_options(cls, rows.options, ROW_SAMPLERS.options_key).selection_rounds
        if rounds >= config.rounds:
            yield (
                f"trainable.embedding_rows.options.selection_rounds = {rounds} leaves no round of {config.rounds} for "
                f"the selected rows; set it below {config.rounds}"
            )
        if config.local.example_dp.enabled:
            yield (
                f"trainable.embedding_rows.sampler = {rows.sampler!r} has devices send maps of their words, which "
                "local.example_dp does not noise; set another sampler, or local.example_dp.enabled = false"
            )


def sampler_of(config: RowsConfig) -> RowSampler:
    """Return the row sampler that a config names, with its options.

    Raises:
        ConfigError: No such sampler, or an option that it does not have.
    """
    kind = ROW_SAMPLERS.resolve(config.sampler)
    sampler: RowSampler = kind(typed_options(kind, config.options, ROW_SAMPLERS.options_key))
    return sampler


def row_set(config: RowsConfig, frequencies: Frequencies, *, seed: int, round_number: int) -> RowIds:
    """Return the sorted row ids (S,) of one round.

    Arguments:
        config: Sampler and expected size; `count` is at most V.
        frequencies: Public word frequencies (V,).
        seed: The server's seed.
        round_number: Counts from 1.

    Raises:
        DataError: A plug-in drew what is no set of rows.
    """
    if config.count == 0:
        return np.empty(0, np.int64)
    drawn = sampler_of(config).draw(frequencies, config.count, seed=seed, round_number=round_number)
    ids = np.sort(np.asarray(drawn).astype(np.int64))
    if not len(ids) or ids[0] < 0 or ids[-1] >= len(frequencies) or (np.diff(ids) == 0).any():
        raise DataError(
            f"trainable.embedding_rows.sampler = {config.sampler!r} drew in round {round_number} what is no set "
            f"of rows; return distinct ids from 0 to {len(frequencies) - 1}"
        )
    return ids


def inclusion_probabilities(frequencies: Frequencies, alpha: float, count: int) -> Frequencies:
    """Return pi (V,) = min(1, c p^alpha) with sum `count`; c is found by fixing the saturated rows at one."""
    weights = frequencies**alpha  # (V,)
    order = np.argsort(-weights, kind="stable")
    ranked = weights[order]
    tails = np.cumsum(ranked[::-1])[::-1]  # (V,) weight of this row and of all lighter ones
    ranks = np.arange(len(ranked))
    unsaturated = (count - ranks) * ranked <= tails  # row `rank` is the first that needs no cap
    first = int(np.argmax(unsaturated)) if unsaturated.any() else len(ranked)
    pi = np.ones(len(ranked))
    if first < len(ranked):
        pi[order[first:]] = (count - first) * ranked[first:] / tails[first]
    return np.minimum(pi, 1.0)


def _systematic(pi: Frequencies, rng: np.random.Generator) -> RowIds:
    """Draw a set with inclusion probabilities pi, of size sum(pi) when that is whole, in a random order of rows."""
    order = rng.permutation(len(pi))
    edges = np.floor(np.cumsum(pi[order]) - 1e-9 + rng.random())  # the 1e-9 keeps a whole sum from rounding up
    return order[np.flatnonzero(np.diff(edges, prepend=0.0) > 0)].astype(np.int64)
