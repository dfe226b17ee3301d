"""What every mechanism promises: budgets in order, realised participation, storage, and refusals with a way out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlm.codec import decode, encode, from_text, to_text
from fedlm.errors import ConfigError, DataError
from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.privacy.mechanisms import Mechanism, Participation, create
from fedlm.registry import MECHANISMS

RULES = {
    "poisson": Participation("poisson", 1_000, 20, 30),
    "truncated_poisson": Participation("truncated_poisson", 1_000, 20, 30, cap=50),
    "fixed": Participation("fixed", 1_000, 20, 30, max_participations=9),
    "cyclic_poisson": Participation("cyclic_poisson", 1_000, 20, 30, separation=5),
    "separated": Participation("separated", 120, 20, 30, separation=5, max_participations=6),
}
SAMPLERS = {name: MECHANISMS.resolve(name).samplers for name in MECHANISMS.built_in}
NAMES = [name for name in MECHANISMS.built_in if MECHANISMS.resolve(name).trusts_server]
PAIRS = [(name, sampler) for name in NAMES for sampler in SAMPLERS[name]]
MADE = {pair: create(pair[0], RULES[pair[1]], delta=1e-6, epsilon=2.0) for pair in PAIRS}
DELTA = 1e-6


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_calibrated_noise_meets_its_epsilon_from_below(pair: tuple[str, str]) -> None:
    z = MADE[pair].noise_multiplier(epsilon=2.0, delta=DELTA)
    assert 2.0 * 0.999 <= MADE[pair].epsilon(noise_multiplier=z, num_releases=30, delta=DELTA) <= 2.0


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_epsilon_grows_with_releases_and_realised_epsilon_stays_below(pair: tuple[str, str]) -> None:
    made = MADE[pair]
    before = 0.0
    for releases in (0, 1, 4, 5, 6, 17, 29, 30):
        spent = made.epsilon(noise_multiplier=2.0, num_releases=releases, delta=DELTA)
        assert spent >= before * (1 - 1e-6)
        before = spent
        for separation, times in ((5, 6), (6, 5), (30, 1), (7, 2)):
            realised = made.realised_epsilon(
                noise_multiplier=2.0,
                num_releases=releases,
                delta=DELTA,
                separation=separation,
                max_participations=times,
            )
            assert realised <= spent * (1 + 1e-9)
    assert made.epsilon(noise_multiplier=2.0, num_releases=0, delta=DELTA) == 0
    with pytest.raises(ConfigError, match="num_releases = 31"):
        made.epsilon(noise_multiplier=2.0, num_releases=31, delta=DELTA)
    with pytest.raises(ConfigError, match="noise_multiplier"):
        made.epsilon(noise_multiplier=0.0, num_releases=3, delta=DELTA)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "poisson" not in pair[1]], ids="-".join)
def test_a_broken_rule_costs_more(pair: tuple[str, str]) -> None:
    made = MADE[pair]
    spent = made.epsilon(noise_multiplier=2.0, num_releases=30, delta=DELTA)
    broken = made.realised_epsilon(
        noise_multiplier=2.0, num_releases=30, delta=DELTA, separation=1, max_participations=30
    )
    assert broken > spent


def test_classes_that_were_not_kept_lose_their_amplification() -> None:
    made, rule = MADE["banded", "cyclic_poisson"], RULES["cyclic_poisson"]
    plain = create("banded", replace(rule, sampler="separated"), delta=DELTA, bands=5)
    seen: dict[str, Any] = {"separation": 2, "max_participations": 3, "num_releases": 30, "delta": DELTA}
    assert made.realised_epsilon(noise_multiplier=2.0, **seen) == plain.realised_epsilon(noise_multiplier=2.0, **seen)
    assert made.realised_epsilon(noise_multiplier=2.0, **seen) > made.epsilon(
        noise_multiplier=2.0, num_releases=30, delta=DELTA
    )


def test_samplers_are_accounted_as_what_they_are() -> None:
    def spent(sampler: str) -> float:
        return MADE["gaussian", sampler].epsilon(noise_multiplier=2.0, num_releases=30, delta=DELTA)

    assert spent("poisson") < spent("truncated_poisson") < spent("fixed")
    assert spent("fixed") == subsampled_gaussian.gaussian_epsilon(3 / 2.0, DELTA)
    assert spent("separated") == subsampled_gaussian.gaussian_epsilon(6**0.5 / 2.0, DELTA)
    sampled = subsampled_gaussian.epsilon(sampling_probability=0.1, noise_multiplier=2.0, rounds=6, delta=DELTA)
    one = create("banded", RULES["cyclic_poisson"], delta=DELTA, bands=1)
    assert one.epsilon(noise_multiplier=2.0, num_releases=30, delta=DELTA) == sampled


@settings(max_examples=60, deadline=None)
@given(mu=st.floats(1e-4, 50), delta=st.floats(1e-12, 0.5))
def test_mu_inverts_epsilon_from_below(mu: float, delta: float) -> None:
    spent = subsampled_gaussian.gaussian_epsilon(mu, delta)
    if spent > 1e-6:
        found = subsampled_gaussian.gaussian_mu(spent, delta)
        assert found == pytest.approx(mu, rel=1e-6)
        assert subsampled_gaussian.gaussian_epsilon(found, delta) <= spent


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_stored_fields_give_the_same_mechanism(pair: tuple[str, str]) -> None:
    made = MADE[pair]
    restored = from_text(Mechanism, to_text(made, Mechanism), where="stored mechanism")
    assert restored == made
    assert to_text(restored, Mechanism) == to_text(made, Mechanism)
    assert hash(restored) == hash(made)


def fields_of(made: Mechanism, **changes: Any) -> dict[str, Any]:
    return {**encode(made, Mechanism), **changes}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "laplace"}, "must be one of"),
        ({}, "must be one of"),
        ({"name": "tree"}, "lacks participation, must have participation"),
        (fields_of(MADE["banded", "separated"], bands="3"), "bands = '3' must be a whole number"),
        (fields_of(MADE["banded", "separated"], bands=True), "bands = True must be a whole number"),
        (fields_of(MADE["banded", "separated"], bands=6), "privacy.options.bands = 6"),
        (fields_of(MADE["blt", "separated"], poles=[0.5, 0.9]), "interlace"),
        (fields_of(MADE["blt", "separated"], poles=[0.9]), "interlace"),
        (fields_of(MADE["blt", "separated"], poles=[0.9, float("nan")]), r"poles\[1\] = nan must be a number"),
        (fields_of(MADE["tree", "separated"], participation={"sampler": "separated"}), "must have"),
        (fields_of(MADE["tree", "separated"], extra=1), "has unknown 'extra', must have"),
    ],
)
def test_damaged_fields_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        decode(Mechanism, fields, where="stored mechanism")


@pytest.mark.parametrize(
    ("name", "changes", "options", "says"),
    [
        ("laplace", {}, {}, "privacy.mechanism = 'laplace' is unknown"),
        ("blt", {"sampler": "poisson", "separation": 1}, {}, "privacy.sampler = 'poisson' does not go with"),
        ("tree", {"sampler": "fixed", "separation": 1}, {}, "it takes separated"),
        ("gaussian", {"sampler": "poisson"}, {}, "privacy.min_separation = 5 is not kept"),
        ("gaussian", {}, {"bands": 3}, "unknown key 'privacy.options.bands'; Gaussian has no options"),
        ("banded", {}, {"bands": 6}, "raise privacy.min_separation"),
        ("blt", {}, {"buffers": 9}, "privacy.options.buffers = 9"),
        ("blt", {"separation": 7}, {}, "lower privacy.expected_cohort or raise privacy.population"),
        ("tree", {"max_participations": 4}, {}, "privacy.max_participations = 4"),
        ("tree", {"cohort": 500}, {}, "privacy.expected_cohort = 500"),
        ("gaussian", {"sampler": "truncated_poisson", "separation": 1}, {}, "cap"),
        (
            "banded",
            {"sampler": "cyclic_poisson", "separation": 1},
            {"noise_multiplier": 1.0},
            "privacy.options.bands = 0",
        ),
        ("banded", {"sampler": "cyclic_poisson", "separation": 1}, {}, "privacy.epsilon = 0"),
    ],
)
def test_impossible_combinations_say_what_to_do(
    name: str, changes: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        create(name, replace(RULES["separated"], **changes), delta=DELTA, **options)


def test_bands_and_classes() -> None:
    rule = replace(RULES["cyclic_poisson"], separation=1)
    open_classes = create("banded", rule, delta=DELTA, bands=4)
    assert open_classes.participation.separation == open_classes.bands == 4
    fewer = create("banded", RULES["cyclic_poisson"], delta=DELTA, bands=2)
    assert fewer.participation.separation == 5
    assert create("banded", RULES["cyclic_poisson"], delta=DELTA).bands == 5
    assert create("banded", rule, delta=DELTA, epsilon=50.0, most_apart=3).bands <= 3


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_descriptions_name_sampling_and_adjacency(pair: tuple[str, str]) -> None:
    made = MADE[pair]
    assert "20 / " in made.description
    assert ("Poisson" in made.description) == ("poisson" in pair[1])
    amplified = "poisson" in pair[1] and pair[0] != "local"
    assert ("add or remove" in made.adjacency) == amplified


def test_default_samplers() -> None:
    assert [SAMPLERS[name][0] for name in NAMES] == ["poisson", "separated", "cyclic_poisson", "separated", "separated"]
