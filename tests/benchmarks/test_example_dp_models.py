"""All sides of the example-level DP comparison compute the same clipped sums: checked here on small models."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from benchmarks.example_dp_models import CLIP_NORM, Sizes, batch, build, choose, joint_norm, one_at_a_time
from benchmarks.example_dp_ours import PlainWithOurHead, ours
from benchmarks.example_dp_peers import OpacusGhost, OpacusHooks, Plain
from benchmarks.example_dp_targets import verdicts

SIZES = Sizes(vocabulary=120, width=32, num_layers=2, num_heads=2, width_ff=64, num_examples=4)
LENGTH = 16
KINDS = ["classifier", "lm"]


@pytest.fixture
def float64():
    """New tensors in float64 for the time of a test, so that agreement is no matter of rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_definition(kind: str, scope: str, stability: float = 0.0) -> dict[str, Tensor]:
    model = build(kind, SIZES, LENGTH)
    return one_at_a_time(model, choose(model, kind, scope), batch(kind, SIZES, LENGTH), stability)


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return joint_norm({name: found[name] - wanted[name] for name in wanted}) / joint_norm(wanted)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scope", ["full", "body", "bias", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_ours_is_the_definition(kind, scope):
    side = ours(kind)(build(kind, SIZES, LENGTH), kind, scope)
    found = side.stock_names(side.step(batch(kind, SIZES, LENGTH)))
    assert distance(found, by_definition(kind, scope)) < 1e-10


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore")  # of torch, about Opacus's hooks
@pytest.mark.parametrize("scope", ["full", "bias", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_opacus_is_the_definition_too(kind, scope):
    pytest.importorskip("opacus", reason="Opacus comes with the extra 'test'")
    inputs = batch(kind, SIZES, LENGTH)
    sides = [OpacusHooks] if (kind, scope) == ("lm", "full") else [OpacusHooks, OpacusGhost]
    for made in sides:
        found = made(build(kind, SIZES, LENGTH), kind, scope).step(inputs)
        assert distance(found, by_definition(kind, scope, stability=1e-6)) < 1e-10


@pytest.mark.filterwarnings("ignore")
def test_opacus_ghost_refuses_the_tied_table():
    pytest.importorskip("opacus", reason="Opacus comes with the extra 'test'")
    side = OpacusGhost(build("lm", SIZES, LENGTH), "lm", "full")
    with pytest.raises(NotImplementedError, match="tying"):
        side.step(batch("lm", SIZES, LENGTH))


@pytest.mark.usefixtures("float64")
def test_both_plain_rows_take_the_same_step():
    inputs = batch("lm", SIZES, LENGTH)
    plain = Plain(build("lm", SIZES, LENGTH), "lm", "bias").step(inputs)
    side = PlainWithOurHead(build("lm", SIZES, LENGTH), "lm", "bias")
    assert distance(side.stock_names(side.step(inputs)), plain) < 1e-10


def test_examples_are_long_enough_to_be_clipped():
    """Without a norm above the bound the comparison would say nothing about clipping."""
    for kind in KINDS:
        model = build(kind, SIZES, LENGTH)
        single = one_at_a_time(model, choose(model, kind, "bias"), batch(kind, SIZES, LENGTH, 1))
        assert joint_norm(single) == pytest.approx(CLIP_NORM, rel=1e-5)


def test_a_wrong_peer_is_no_peer():
    """fastDP on a tied table is the fastest of all and wrong: nothing is compared with it."""
    fast, slow = {"step_s": 0.1, "peak_mib": 1.0}, {"step_s": 4.0, "peak_mib": 900.0}
    labels = ("plain bias", "fedlm BiTFiT", "fedlm full", "Opacus full, hooks", "fedlm, table frozen")
    rows = dict.fromkeys(labels, slow) | {"fastDP full": fast}
    checks = {"fastDP full": {"difference": 0.4}, "Opacus full, hooks": {"difference": 1e-6}, "fedlm full": {}}
    texts = [verdict["text"] for verdict in verdicts("lm", {"checks": checks, "lengths": {"64": rows}}, 1e-4)]
    assert any("Opacus full, hooks" in text for text in texts)
    assert not any("fastDP" in text for text in texts)
