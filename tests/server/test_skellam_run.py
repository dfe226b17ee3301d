"""Real runs whose devices add the noise themselves: the law, the model, kill and resume, bytes, empty rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.stats import kstest
from tiny_private_runs import TINY, StoppedError, final, lines, quiet, stop_in

from fedlm.config.schema import Config
from fedlm.errors import ConfigError
from fedlm.privacy.plan import PrivacyPlan
from simulations.run import simulate

Make = Callable[..., Config]

SKELLAM = "privacy.mechanism=skellam"
QUIET_NOISE = ("privacy.epsilon=0", "privacy.noise_multiplier=0.0625", "privacy.reproducible_noise=false")


def first_release(run: Path) -> dict[str, Any]:
    return load_file(run / "journal" / "round_000001.safetensors")


def plan_of(run: Path) -> PrivacyPlan:
    return PrivacyPlan.from_json((run / "plan.json").read_text(), seed=1, cohort_key=None)


def test_a_release_is_the_gaussians_but_for_the_noise(small: Make, tmp_path: Path) -> None:
    """Same cohorts, same training: the first releases differ by two independent noises of the plan's size."""
    rest = (*TINY, *QUIET_NOISE, "execution.checkpoint_every=100")
    for name in ("gaussian", "skellam"):
        with pytest.raises(StoppedError):
            simulate(small(*rest, f"privacy.mechanism={name}"), tmp_path / name, stop_in(2))
    mine, theirs = (first_release(tmp_path / name)["mean"] for name in ("skellam", "gaussian"))
    plan = plan_of(tmp_path / "skellam")
    std = 0.0625 * plan.clip_norm / plan.expected_cohort
    noise = (mine.astype(np.float64) - theirs) / std / np.sqrt(2)
    assert kstest(noise, "norm").pvalue > 1e-6
    assert np.linalg.norm(theirs) > 0.2 * plan.clip_norm  # there was something to agree on


def test_with_hardly_any_noise_the_step_is_that_without(small: Make, tmp_path: Path) -> None:
    """Clipped at a norm that no update reaches, so that only grid and noise can tell the two first steps apart."""
    rest = (*TINY, "fleet.cohort=60", "execution.checkpoint_every=100")
    with pytest.raises(StoppedError):
        simulate(small(*rest, *QUIET_NOISE, SKELLAM, "privacy.clip_norm=2"), tmp_path / "skellam", stop_in(2))
    with pytest.raises(StoppedError):
        simulate(small(*rest, "privacy.enabled=false"), tmp_path / "plain", stop_in(2))
    mine, exact = (first_release(tmp_path / name)["mean"].astype(np.float64) for name in ("skellam", "plain"))
    std = 0.0625 * 2 / 60
    assert (mine - exact).std() == pytest.approx(std, rel=0.1)
    assert abs(np.dot(mine - exact, exact)) < 5 * std * np.linalg.norm(exact)  # nothing of the signal is lost


def test_the_ledger_has_the_bits_of_the_encodings_and_both_guarantees(small: Make, tmp_path: Path) -> None:
    simulate(small(*TINY, *QUIET_NOISE, SKELLAM, "rounds=2"), tmp_path / "run", quiet)
    start, *rest = lines(tmp_path / "run", "ledger.jsonl")
    encoder = plan_of(tmp_path / "run").encoder(sum(block["bytes"] for block in start["blocks"]) // 4)
    assert encoder is not None
    per_device = -(-encoder.padded_size * encoder.bits // 8)
    rounds = [line for line in rest if "bytes_up" in line]
    assert len(rounds) == 2
    assert all(line["bytes_up"] == line["uploaded"] * per_device > 0 for line in rounds)
    figures = start["privacy"]
    assert figures["epsilon"] < figures["epsilon_server"]
    assert figures["mechanism"] == "skellam"


def test_a_round_without_a_quorum_or_without_anybody_is_released(small: Make, tmp_path: Path) -> None:
    few = ("fleet.cohort=1", "rounds=5", "privacy.clip_quantile=0.5")
    simulate(small(*TINY, *QUIET_NOISE, SKELLAM, *few), tmp_path / "run", quiet)
    uploaded = [line["uploaded"] for line in lines(tmp_path / "run", "ledger.jsonl") if "uploaded" in line]
    assert len(uploaded) == 5
    assert 0 in uploaded  # else the seed has to be another one
    assert np.isfinite(final(tmp_path / "run")["values"]).all()


def test_a_mimicked_fleet_is_refused_before_the_first_round(small: Make, tmp_path: Path) -> None:
    mimicked = ("privacy.population=1000000", "privacy.expected_cohort=1000")
    with pytest.raises(ConfigError, match=r"set privacy\.population = 0"):
        simulate(small(*TINY, SKELLAM, *mimicked), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()
