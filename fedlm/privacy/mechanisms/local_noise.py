"""Local differential privacy: every device adds its noise itself, as a comparison (Kasiviswanathan et al. 2011, "What
can we learn privately?"; the analytic Gaussian of Balle and Wang 2018, https://arxiv.org/abs/1805.06530).

    report_u = clip(Delta_u) + N(0, (2 z C)^2),    release_t = sum over the reports

The server is not trusted: it sees each report and knows whose it is, so nothing amplifies, and a device's report must
hide which of two updates it had, at most 2 C apart. k reports of one device have mu = sqrt(k) / z.

Exact: epsilon. The sum of n reports has the noise of n devices, sqrt(n) 2 z C; the simulation draws it at once, which
has the same law. A device sends its whole noised update: no secure sum, no compression that rests on zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlm.codec import coded
from fedlm.privacy.mechanisms.base import Floats, Participation, RoundNoise
from fedlm.privacy.mechanisms.participations import check, most_participations, sampling_clause
from fedlm.privacy.mechanisms.streaming import IndependentNoise
from fedlm.privacy.mechanisms.unsampled import Unsampled

_SENSITIVITY = 2.0


@coded
@dataclass(frozen=True)
class Local(Unsampled):
    """Local differential privacy; see the module.

    Arguments:
        participation: Any sampler; only how often a device reports counts.

    Guarantee:
        For each device against everybody, the server included: exchanging all its data for any other changes the
        probability of whatever is computed from its reports by at most e^epsilon, up to delta.

    Edge cases:
        A round in which nobody reports gets the noise of one report.
    """

    participation: Participation

    name: ClassVar[str] = "local"
    samplers: ClassVar[tuple[str, ...]] = ("separated", "poisson", "truncated_poisson", "fixed", "cyclic_poisson")
    summary: ClassVar[str] = "noise that every device adds itself (local privacy)"
    by_report: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the participation rule."""
        check(self.participation, self.name, self.samplers)

    @property
    def adjacency(self) -> str:
        """Replacement."""
        return "one user's data replaced by any other, against the server too"

    @property
    def description(self) -> str:
        """Sampling and noise in words."""
        times = most_participations(self.participation, self.participation.rounds)
        return (
            f"{sampling_clause(self.participation)} (not amplifying), noise of standard deviation 2 z C added by every "
            f"device to each of at most {times:,} reports"
        )

    def sensitivity(self, num_releases: int, *, separation: int = 0, max_participations: int = 0) -> float:
        """Return sqrt(k): 2 sqrt(k) clip norms in units of noise that is scaled by the same 2."""
        return math.sqrt(most_participations(self.participation, num_releases, separation, max_participations))

    def prefix_rmse(self) -> float:
        """Return the root mean square noise of prefix sums for z = 1 and cohorts of the expected size."""
        return _SENSITIVITY * math.sqrt(self.participation.cohort * (self.participation.rounds + 1) / 2)

    def noise_growth(self, num_reports: float) -> float:
        """Return 2 sqrt(n); that of one report for none, so that every round's sum is noised."""
        return _SENSITIVITY * math.sqrt(num_reports or 1.0)

    def round_growth(self) -> Floats:
        """Return ones (T,)."""
        return np.ones(self.participation.rounds)

    def new_noise(self, size: int) -> RoundNoise:
        """Return noise without memory; what it adds is to be multiplied by `noise_growth`."""
        return IndependentNoise()
