"""`fedlm audit` on real runs: honest mechanisms pass; half the noise and a strategy that uses the raw sum do not."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tiny_fedlm import Done

from fedlm.cli import main
from fedlm.config.load import load_config
from fedlm.config.schema import Config
from fedlm.environment import QUIET_ENVIRONMENT
from fedlm.errors import DataError
from fedlm.privacy.clipping.clipped_sum import ClippedSum
from fedlm.privacy.noise.lattice import NoiseStream
from fedlm.privacy.plan import PrivacyPlan
from fedlm.strategies import Release, ServerOptimizer, StrategyState, Vector
from simulations.run import simulate
from simulations.run_audit import analyse

CONFIG = """
rounds = 6
[data]
corpus = "synthetic"
cache_dir = "{cache}"
sequence_length = 16
max_eval_tokens = 500
public_fraction = 0.2
[synthetic]
users = 200
tokens_per_user = 40
classes = 16
[vocabulary]
size = 500
[model]
d_model = 32
num_layers = 1
num_heads = 2
[pretrain]
epochs = 1
negatives = 100
[trainable]
lora = {{ rank = 4 }}
embedding_rows = {{ count = 300, sampler = "top_k" }}
[loss]
negatives = 64
[fleet]
cohort = 60
[privacy]
epsilon = 0.0
noise_multiplier = 2.0
delta = 1e-4
clip_norm = 10.0
reproducible_cohorts = true
[strategy]
kind = "fedavg"
learning_rate = 1.0
[execution]
grid = "inprocess"
group_size = 8
eval_every = 0
[audit]
canaries = 240
text_canaries = 6
phrase_candidates = 64
"""
Audit = Callable[..., Done]


class RawSum(ServerOptimizer):
    """A strategy that steps with the sum itself, which a server leaked to it."""

    leaked: npt.NDArray[np.float64]

    def update(self, state: StrategyState, release: Release) -> tuple[Vector, dict[str, float]]:
        return state.values + (self.leaked / 60).astype(np.float32), {}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    (folder / "audit.toml").write_text(CONFIG.format(cache=folder / "cache"))
    return folder / "audit.toml"


@pytest.fixture
def audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path) -> Audit:
    """Run `fedlm audit --json` in this process, with the same noise each time: one alarm in a thousand is chance."""
    monkeypatch.setattr("secrets.randbits", random.Random(7).getrandbits)
    for name in QUIET_ENVIRONMENT:  # so that what main sets is undone
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def run(*overrides: str, target: Path = config, out: str = "run") -> Done:
        capsys.readouterr()
        words = ["audit", str(target), "--json", "--quiet", "--out", str(tmp_path / out)]
        code = main([*words, *(word for override in overrides for word in ("--set", override))])
        said = capsys.readouterr()
        return Done(code, said.out, said.err, tmp_path / out)

    return run


MECHANISMS = {
    "gaussian": [],
    "blt": ["privacy.mechanism=blt"],
    "banded": ["privacy.mechanism=banded", "privacy.options.bands=3", "privacy.sampler=cyclic_poisson"],
}


def check_known(view: dict[str, Any], factor: float) -> None:
    """Check that the estimate is `factor` times the analytic distance, within five standard errors."""
    found = view["gaussian"]
    error = (found["mu_high"] - found["mu_low"]) / (2 * 1.96)
    # mu is linear in 1 / z, so the analytic mu is where the accounted epsilon lies on the curve of the estimate.
    analytic = distance(view["accounted"], found["delta"])
    assert abs(found["mu"] - factor * analytic) < 5 * error + 0.03 * factor * analytic


def distance(epsilon: float, delta: float) -> float:
    """Return mu of the Gaussian with this epsilon, by its definition."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    def excess(mu: float) -> float:
        tail = math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
        return float(norm.cdf(mu / 2 - epsilon / mu) - tail - delta)

    return float(brentq(excess, 1e-3, 50))


@pytest.mark.parametrize("name", MECHANISMS)
def test_an_honest_run_passes(audit: Audit, name: str) -> None:
    done = audit(*MECHANISMS[name])
    report = done.summary
    hidden, known, model = report["views"]
    assert not report["alarms"]
    assert any(stamp == "AUDIT: 246 canary devices take part" for stamp in report["stamps"])
    assert [view["name"] for view in report["views"]] == ["hidden", "known", "model"]
    assert hidden["accounted"] <= known["accounted"] * (1 + 1e-5)
    check_known(known, 1.0)
    for view in (hidden, known, model):
        assert abs(view["stranger_mean"]) < 5 / math.sqrt(view["num_strangers"])
        assert view["one_run"]["epsilon"] <= view["accounted"]
    assert 0 < report["cost"]["ratio"] < 0.2
    assert report["text"]["num_members"] + report["text"]["num_strangers"] == 6
    assert json.loads((done.folder / "audit.json").read_text()) == report
    assert len(list((done.folder / "journal").iterdir())) == 6


def test_an_audit_can_be_read_again(audit: Audit) -> None:
    first = audit("rounds=2", "execution.checkpoint_every=1", "audit.canaries=20").summary
    again = audit(target=Path(first["run_dir"]), out="unused").summary
    assert again == first


@pytest.mark.parametrize("name", ["gaussian", "blt"])
def test_half_the_noise_raises_the_alarm(audit: Audit, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    normals = NoiseStream.normals

    def halved(self: NoiseStream, out: npt.NDArray[np.float64]) -> None:
        normals(self, out)
        out *= 0.5

    monkeypatch.setattr(NoiseStream, "normals", halved)
    done = audit(*MECHANISMS[name])
    assert done.code == 1
    assert "fedlm: ALARM: to who sees all releases and knows every cohort, epsilon is at least" in done.error
    report = json.loads(done.out)
    check_known(report["views"][1], 2.0)
    assert report["alarms"]


def test_a_server_that_bypasses_the_noise_is_caught_by_the_model(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    release = PrivacyPlan.release

    def leaking(plan: PrivacyPlan, total: ClippedSum, *rest: Any) -> Release:
        RawSum.leaked = total.to_arrays()[0] * total.clip_spec.unit
        return release(plan, total, *rest)

    monkeypatch.setattr(PrivacyPlan, "release", leaking)
    done = audit(f"strategy.kind={__name__}:RawSum")
    report = json.loads(done.out)
    assert done.code == 1
    assert any("the final model" in alarm for alarm in report["alarms"])
    check_known(report["views"][1], 1.0)  # its releases are as they should be


def test_noise_that_can_be_repeated_has_no_finite_epsilon(config: Path, tmp_path: Path) -> None:
    settings: Config = load_config(config, ["privacy.reproducible_noise=true", "rounds=1", "audit.text_canaries=0"])
    simulate(settings, tmp_path / "run", lambda event: None)
    report = analyse(tmp_path / "run")
    assert {view.accounted for view in report.views} == {math.inf}
    assert not report.alarms
    assert any("seed" in note for note in report.notes)


def test_what_cannot_be_audited_is_refused(audit: Audit, config: Path, tmp_path: Path) -> None:
    done = audit("privacy.enabled=false")
    assert (done.code, done.out) == (2, "")
    assert "nothing to audit" in done.error
    settings = load_config(config, ["rounds=1", "audit.canaries=0", "audit.text_canaries=0"])
    simulate(settings, tmp_path / "plain", lambda event: None)
    done = audit(target=tmp_path / "plain")
    assert done.code == 2
    assert "--canaries" in done.error
    for file in (tmp_path / "plain" / "journal").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="finished run"):
        analyse(tmp_path / "plain")
