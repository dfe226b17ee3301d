"""No factor lets an example beyond the bound, whatever its norm."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlm.errors import ConfigError
from fedlm.example_dp.clip_rule import KINDS, SLACK, ClipRule, accepted

sizes = st.floats(min_value=0, max_value=1e19)  # the square of a larger one is infinite in float32


@settings(deadline=None)
@given(norm=sizes, clip_norm=st.floats(min_value=1e-6, max_value=1e6), kind=st.sampled_from(KINDS))
def test_the_bound_holds_even_if_the_norm_seems_smaller_by_the_slack(norm: float, clip_norm: float, kind: str) -> None:
    seen = torch.tensor([norm / (1 + SLACK)], dtype=torch.float64)
    factor = ClipRule(kind, clip_norm).factors(seen).float()
    assert 0 <= float(factor) * norm <= clip_norm * (1 + 1e-7) or math.isinf(float(factor))
    assert math.isfinite(float(factor)) or norm == 0


@settings(deadline=None)
@given(norm=sizes)
def test_flat_never_enlarges_and_leaves_short_gradients_alone(norm: float) -> None:
    factor = float(ClipRule("flat", 1.0).factors(torch.tensor([norm], dtype=torch.float64)))
    assert factor <= 1
    assert (factor == 1) == (norm * (1 + SLACK) <= 1) or norm == pytest.approx(1 / (1 + SLACK))


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_that_is_not_finite_gets_factor_zero(kind: str) -> None:
    factors = ClipRule(kind, 0.5).factors(torch.tensor([0.0, 1.0, torch.inf, torch.nan]))
    assert torch.isfinite(factors).all()
    assert (factors > 0).tolist() == [True, True, False, False]


def test_no_bound_changes_nothing_but_still_drops_what_is_not_finite() -> None:
    factors = ClipRule("flat", math.inf).factors(torch.tensor([0.0, 1e30, torch.inf, torch.nan]))
    assert factors.tolist() == [1, 1, 0, 0]


def test_automatic_clipping_brings_all_to_nearly_the_bound() -> None:
    norms = torch.tensor([0.5, 5.0, 500.0], dtype=torch.float64)
    reached = ClipRule("automatic", 0.1).factors(norms) * norms
    torch.testing.assert_close(reached, 0.1 / (1 + SLACK) * norms / (norms + 0.01))


def test_rejected_examples_are_left_out() -> None:
    factors, values = accepted(torch.tensor([0.5, 0.0]), torch.tensor([[2.0], [torch.nan]]))
    assert (factors.tolist(), values.tolist()) == ([0.5], [[2.0]])


@pytest.mark.parametrize(
    ("kind", "clip_norm", "message"),
    [
        ("ghost", 1.0, "clipping = 'ghost' is not one of flat, automatic"),
        ("flat", 0.0, "clip_norm = 0.0 must be above 0"),
        ("flat", math.nan, "must be above 0"),
        ("automatic", math.inf, "needs a finite clip_norm"),
    ],
)
def test_refusals(kind: str, clip_norm: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClipRule(kind, clip_norm)
