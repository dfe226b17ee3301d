"""What an audit found, as figures and as sentences."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf, isfinite, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlm.auditing.gaussian_bound import CERTAINTY, INTERVAL, GaussianBound, gaussian_bound
from fedlm.auditing.one_run import OneRunBound, one_run_bound
from fedlm.privacy.guarantee import Guarantee, to_dict
from fedlm.rounding import stamped

ODD = 5.0
"""Standard errors by which the strangers' scores may miss their law before a view counts as broken."""

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class View:
    """One kind of analyst: what it sees, what it found, and what the accountant allows it.

    Arguments:
        name: A word for it.
        sees: A clause.
        accounted: Epsilon that holds against it; infinity if none does.
        gaussian: The empirical epsilon.
        one_run: The bound without a model of the noise, at the confidence of the interval.
        one_run_at_least: The same at the alarm's confidence.
        num_strangers: Canaries that contributed zero.
        stranger_mean: Of their scores; zero within 1 / sqrt(num_strangers).
        stranger_rms: Root mean square of their scores; one.
    """

    name: str
    sees: str
    accounted: float
    gaussian: GaussianBound
    one_run: OneRunBound
    one_run_at_least: float
    num_strangers: int
    stranger_mean: float
    stranger_rms: float

    @property
    def at_least(self) -> float:
        """The larger lower bound at the alarm's confidence."""
        return max(self.gaussian.at_least, self.one_run_at_least)

    @property
    def is_broken(self) -> bool:
        """Whether strangers' scores do not follow their law, so that nothing here can be believed."""
        errors = sqrt(self.num_strangers)
        return max(abs(self.stranger_mean) * errors, abs(self.stranger_rms**2 - 1) * errors / sqrt(2)) > ODD

    @property
    def alarm(self) -> str:
        """Return the alarm; empty if there is none."""
        if self.is_broken or self.at_least <= self.accounted:
            return ""
        return (
            f"ALARM: {self.sees}, epsilon is at least {self.at_least:.4g} at delta {self.gaussian.delta:g} with "
            f"confidence {CERTAINTY:.1%}, but {self.accounted:.4g} is accounted for; "
            "clipping, noise, sampling or accounting of this run is not what its plan says"
        )


def make_view(
    name: str, sees: str, scores: Floats, strengths: Floats, members: Flags, *, accounted: float, delta: float
) -> View:
    """Return a view of the canaries' scores.

    Arguments:
        name, sees, accounted: As in `View`.
        scores: (k,) of all canaries.
        strengths: (k,) as for `gaussian_bound`.
        members: (k,) coins.
        delta: Of all epsilons.
    """
    strangers = scores[~members & (strengths > 0)]
    evidence = scores * strengths

    def one_run(confidence: float) -> OneRunBound:
        return one_run_bound(evidence, members, delta=delta, confidence=confidence)

    return View(
        name=name,
        sees=sees,
        accounted=accounted,
        gaussian=gaussian_bound(scores[members], strengths[members], delta=delta),
        one_run=one_run(INTERVAL),
        one_run_at_least=one_run(CERTAINTY).epsilon,
        num_strangers=len(strangers),
        stranger_mean=float(strangers.mean()) if len(strangers) else 0.0,
        stranger_rms=sqrt(float(np.mean(strangers**2))) if len(strangers) else 1.0,
    )


@dataclass(frozen=True)
class TextReport:
    """Exposure of text canaries, in bits.

    Arguments:
        num_members, num_strangers: Canaries that trained, and that did not.
        candidates: R; exposures lie between 0 and log2 R.
        member_exposure, stranger_exposure: Means; None without such canaries.
        largest_exposure: Of a member.
        p_value: Of exposures this high if members were strangers.
    """

    num_members: int
    num_strangers: int
    candidates: int
    member_exposure: float | None
    stranger_exposure: float | None
    largest_exposure: float | None
    p_value: float | None


@dataclass(frozen=True)
class CanaryCost:
    """What gradient canaries cost the model, norms in units of the mean update of a round.

    Arguments:
        fleet_share: Canaries of all kinds as a share of the fleet.
        canary_norm: Root mean square norm of what the members among them add.
        noise_norm: Of the privacy noise.
    """

    fleet_share: float
    canary_norm: float
    noise_norm: float

    @property
    def ratio(self) -> float:
        """Canaries' norm as a part of the noise's."""
        return self.canary_norm / self.noise_norm if self.noise_norm else inf


@dataclass(frozen=True)
class AuditReport:
    """The whole audit of one run.

    Arguments:
        run_dir: The run folder.
        guarantee: What the run claims, with its stamps.
        rounds: T.
        num_canaries: k gradient canaries.
        num_coordinates: P that were looked at.
        views: Of the gradient canaries; none without them.
        text: Of the text canaries; None without them.
        cost: Of the canaries.
        notes: What a reader has to know about this audit.
    """

    run_dir: str
    guarantee: Guarantee
    rounds: int
    num_canaries: int
    num_coordinates: int
    views: tuple[View, ...]
    text: TextReport | None
    cost: CanaryCost
    notes: tuple[str, ...]

    @property
    def alarms(self) -> tuple[str, ...]:
        """Every alarm; none if the audit found nothing against the run's claim."""
        return tuple(stamped(view.alarm, self.guarantee.warnings) for view in self.views if view.alarm)

    def to_fields(self) -> dict[str, Any]:
        """Return all figures, JSON-ready; infinities are None."""
        fields = _finite(asdict(self))
        del fields["guarantee"]
        fields["cost"]["ratio"] = _finite(self.cost.ratio)
        return {**to_dict(self.guarantee), **fields, "alarms": list(self.alarms)}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
