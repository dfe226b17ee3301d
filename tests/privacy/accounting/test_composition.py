"""Composed epsilon of unlike releases: against dp-accounting's own accountants, closed forms and limits."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedlm.errors import ConfigError
from fedlm.privacy.accounting import rdp, subsampled_gaussian
from fedlm.privacy.accounting.composition import Event, composed_epsilon

DELTA = 1e-6
UNLIKE = [
    [Event(0.01, 1.0, 200), Event(0.02, 1.5, 100)],
    [Event(0.05, 3.0, 10), Event(0.005, 0.7, 400)],
    [Event(1.0, 5.0, 1), Event(0.01, 1.0, 500)],
    [Event(0.3, 2.0, 3), Event(0.1, 2.0, 3), Event(0.02, 2.0, 30)],
]


def theirs(events: list[Event]) -> dp_accounting.DpEvent:
    def one(event: Event) -> dp_accounting.DpEvent:
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(event.sampling_probability, gaussian)
        return dp_accounting.SelfComposedDpEvent(sampled, event.rounds)

    return dp_accounting.ComposedDpEvent([one(event) for event in events])


@pytest.mark.parametrize("events", UNLIKE)
def test_it_is_what_dp_accounting_composes_on_another_grid(events: list[Event]) -> None:
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=2e-4)
    assert composed_epsilon(events, DELTA) == pytest.approx(
        accountant.compose(theirs(events)).get_epsilon(DELTA), rel=1e-4
    )


@pytest.mark.parametrize("events", UNLIKE)
def test_it_lies_between_the_dearest_event_and_both_rdp_bounds(events: list[Event]) -> None:
    found = composed_epsilon(events, DELTA)
    accountant = dp_accounting.rdp.RdpAccountant(list(range(2, 129)))
    curve = sum(
        e.rounds * rdp.poisson_sampled(rdp.gaussian(e.noise_multiplier), e.sampling_probability) for e in events
    )
    assert found <= accountant.compose(theirs(events)).get_epsilon(DELTA) <= rdp.epsilon(np.asarray(curve), delta=DELTA)
    alone = [
        subsampled_gaussian.epsilon(
            sampling_probability=e.sampling_probability,
            noise_multiplier=e.noise_multiplier,
            rounds=e.rounds,
            delta=DELTA,
        )
        for e in events
    ]
    assert max(alone) < found < sum(alone) * (1 + 1e-3) or len(events) > 2


def test_it_is_never_below_the_exact_loss_of_two_releases() -> None:
    # delta(eps) = E[(1 - e^(eps - loss))_+] of two unlike sampled releases, by quadrature over both outputs.
    first, second = Event(0.2, 0.9, 1), Event(0.4, 1.7, 1)
    found = composed_epsilon([first, second], 1e-4)

    def densities(event: Event) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        q, z = event.sampling_probability, event.noise_multiplier
        x = np.linspace(-10 * z, 1 + 10 * z, 3001)
        without = stats.norm.pdf(x, 0, z) * (x[1] - x[0])
        with_it = (1 - q) * without + q * stats.norm.pdf(x, 1, z) * (x[1] - x[0])
        return without, with_it, np.log(with_it / without)

    (p1, q1, l1), (p2, q2, l2) = densities(first), densities(second)
    loss = l1[:, None] + l2[None, :]

    def delta(epsilon: float) -> float:
        added = (q1[:, None] * q2[None, :] * -np.expm1(np.minimum(epsilon - loss, 0))).sum()
        removed = (p1[:, None] * p2[None, :] * -np.expm1(np.minimum(epsilon + loss, 0))).sum()
        return float(max(added, removed))

    assert delta(found) <= 1e-4
    assert delta(found * (1 - 1e-3)) > 1e-4


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0.5, 50), st.integers(0, 100)), min_size=1, max_size=5))
def test_without_sampling_it_is_the_closed_form(parts: list[tuple[float, int]]) -> None:
    mu = math.sqrt(sum(rounds / z**2 for z, rounds in parts))
    found = composed_epsilon([Event(1.0, z, rounds) for z, rounds in parts], DELTA)
    assert found == pytest.approx(subsampled_gaussian.gaussian_epsilon(mu, DELTA), rel=1e-6, abs=1e-9)


def test_like_events_are_one() -> None:
    whole = subsampled_gaussian.epsilon(sampling_probability=0.01, noise_multiplier=1.0, rounds=300, delta=DELTA)
    assert composed_epsilon([Event(0.01, 1.0, 100), Event(0.01, 1.0, 200)], DELTA) == whole
    almost = composed_epsilon([Event(0.01, 1.0, 100), Event(0.01, 1.0 + 1e-9, 200)], DELTA)
    assert almost == pytest.approx(whole, rel=1e-4)


def test_order_does_not_matter_and_empty_events_are_free() -> None:
    events = [*UNLIKE[0], Event(0.5, 0.3, 0), Event(1.0, 0.3, 0)]
    assert composed_epsilon(events, DELTA) == pytest.approx(composed_epsilon(events[::-1], DELTA), rel=1e-9)
    assert composed_epsilon(events, DELTA) == composed_epsilon(UNLIKE[0], DELTA)
    assert composed_epsilon([], DELTA) == composed_epsilon([Event(0.5, 1.0, 0)], DELTA) == 0


def test_almost_no_noise_is_finite_and_no_less_than_alone() -> None:
    rest = Event(0.01, 1.0, 10)
    for z in (1e-4, 0.01, 0.2):
        dear = subsampled_gaussian.epsilon(sampling_probability=1.0, noise_multiplier=z, rounds=1, delta=DELTA)
        assert dear * (1 - 1e-3) <= composed_epsilon([Event(1.0, z, 1), rest], DELTA) < math.inf


@pytest.mark.parametrize(
    ("q", "z", "rounds"), [(0.0, 1.0, 1), (1.1, 1.0, 1), (0.1, 0.0, 1), (0.1, math.nan, 1), (0.1, 1, -1)]
)
def test_numbers_out_of_range_are_refused(q: float, z: float, rounds: int) -> None:
    with pytest.raises(ConfigError):
        Event(q, z, rounds)
    with pytest.raises(ConfigError, match="delta"):
        composed_epsilon([Event(0.1, 1.0, 1)], 0.0)
