"""Accounting without amplification: all T releases are one Gaussian mechanism (Balle and Wang 2018, theorem 8).

A user's contributions to all rounds move the noised quantities by at most `sensitivity` in L2, so the releases
together are a Gaussian mechanism with mu = sensitivity / z, also where each round's updates depend on earlier releases
(Denisov et al. 2022, 2202.08312, theorem 2.1). Nothing is assumed about who is sampled when, but the participation
rule.

Exact: epsilon of that Gaussian mechanism. No composition theorem and no detour through zCDP or RDP is needed, both of
which give more.
"""

from __future__ import annotations

from abc import abstractmethod

from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.privacy.mechanisms.base import Mechanism
from fedlm.privacy.mechanisms.participations import ZERO_OUT
from fedlm.ranges import require_count, require_number


class Unsampled(Mechanism):
    """A mechanism whose guarantee is that of one Gaussian with the sensitivity of all releases together.

    Guarantee:
        Adjacency is zero-out: the cohorts are the same in both worlds, and one user's updates are zero in one of them.

    Edge cases:
        No release or no participation costs 0.
    """

    @abstractmethod
    def sensitivity(self, num_releases: int, *, separation: int = 0, max_participations: int = 0) -> float:
        """Return the L2 sensitivity of the first `num_releases` rounds in units of the clip norm.

        Arguments:
            num_releases: t, in 0..T.
            separation, max_participations: Of any one user; 0: those of the participation rule.
        """

    @property
    def adjacency(self) -> str:
        """Zero-out."""
        return ZERO_OUT

    def epsilon(self, *, noise_multiplier: float, num_releases: int, delta: float) -> float:
        """Return epsilon after the first `num_releases` of T rounds."""
        z, releases = self._checked(noise_multiplier, num_releases)
        return subsampled_gaussian.gaussian_epsilon(self.sensitivity(releases) / z, delta)

    def noise_multiplier(self, *, epsilon: float, delta: float) -> float:
        """Return the smallest z whose T releases cost at most `epsilon`."""
        return self.sensitivity(self.participation.rounds) / subsampled_gaussian.gaussian_mu(epsilon, delta)

    def realised_epsilon(
        self, *, noise_multiplier: float, num_releases: int, delta: float, separation: int, max_participations: int
    ) -> float:
        """Return epsilon for the separation and participations that the ledger saw, within the plan or not."""
        z, releases = self._checked(noise_multiplier, num_releases)
        require_count("separation", separation, low=1)
        if not require_count("max_participations", max_participations):
            return 0.0
        moved = self.sensitivity(releases, separation=separation, max_participations=max_participations)
        return subsampled_gaussian.gaussian_epsilon(moved / z, delta)

    def _checked(self, noise_multiplier: float, num_releases: int) -> tuple[float, int]:
        z = require_number("noise_multiplier", noise_multiplier, above=0, fix="no noise means no privacy")
        return z, require_count("num_releases", num_releases, high=self.participation.rounds)
