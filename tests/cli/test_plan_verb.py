"""`fedlm plan` as its users meet it; its figures against independent computations."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlm.config.load import load_config
from fedlm.models.factory import empty_model
from fedlm.planning.forecast import payload, schedule_of
from fedlm.privacy.accounting.subsampled_gaussian import epsilon, noise_multiplier
from fedlm.privacy.plan import PrivacyPlan
from fedlm.trainable.build import build_trainable
from fedlm.trainable.rows import row_set
from server.payload import DownloadMeter

EXAMPLE_DP = [
    "local.example_dp.enabled=true", "local.example_dp.noise_multiplier=1", "privacy.non_private_diagnostics=false",
    "privacy.metrics=[]",
]  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
CONFIG = [
    "data.corpus=synthetic", "synthetic.users=60", "synthetic.tokens_per_user=90", "synthetic.classes=20",
    "vocabulary.size=900", "model.d_model=32", "model.num_layers=1", "trainable.embedding_rows.count=300",
    "loss.negatives=64", "pretrain.negatives=64", "fleet.cohort=10", "rounds=12", "privacy.population=100000",
    "privacy.expected_cohort=500", "privacy.delta=1e-6",
]  # fmt: skip
# typer below 0.21, which Flower asks for, imports names that click 8.5 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")


def plan(cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    sets = [word for pair in [*CONFIG, f"data.cache_dir={cache}"] for word in ("--set", pair)]
    command = [sys.executable, "-m", "fedlm.cli", "plan", *sets, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def found(cache: Path) -> dict[str, Any]:
    done = plan(cache, "--json", "--epsilon", "3", "--ram", "445", "--bandwidth", "8", "--gflops", "0.5")
    assert (done.returncode, done.stderr) == (0, "")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_payload_is_the_update_and_noise_the_calibrated_one(found: dict[str, Any]) -> None:
    config = load_config(None, CONFIG)
    spec = build_trainable(empty_model(config, 900), config).spec.with_rows(np.arange(300))
    z = noise_multiplier(sampling_probability=0.005, rounds=12, epsilon=3, delta=1e-6)
    assert found["payload"]["up"] == spec.num_bytes == sum(found["payload"]["up_by_kind"].values())
    assert found["noise_multiplier"] == z
    assert found["epsilon"] == epsilon(sampling_probability=0.005, noise_multiplier=z, rounds=12, delta=1e-6)
    assert found["noise_to_signal"]["all"] == pytest.approx(math.sqrt(spec.size) * z / 500)
    by_kind = [value for kind, value in found["noise_to_signal"].items() if kind != "all"]
    assert math.hypot(*by_kind) == pytest.approx(found["noise_to_signal"]["all"])


def test_time_is_work_over_speed_and_bits_over_bandwidth(found: dict[str, Any]) -> None:
    time, moved = found["time"], found["payload"]
    assert time["transfer_s"] == pytest.approx(8 * (moved["up"] + moved["down_again"]) / 8e6)
    assert time["round_s"] == pytest.approx(time["transfer_s"] + time["compute_s"])
    assert time["device_rounds"] == 12 * 10


def test_memory_parts_add_up_and_settings_fit_when_the_largest_user_does(found: dict[str, Any]) -> None:
    for parts in found["memory_mb"].values():
        assert sum(v for name, v in parts.items() if name not in ("tokens", "total")) == pytest.approx(parts["total"])
    settings = found["settings"]
    (asked,) = [s for s in settings if s["asked"]]
    assert asked["peak_mb"] == pytest.approx(found["memory_mb"]["largest user"]["total"])
    assert asked["bytes_up"] == found["payload"]["up"]
    assert asked["noise_to_signal"] == found["noise_to_signal"]["all"]
    assert all(s["fits"] == (s["peak_mb"] <= 445) for s in settings)
    assert all(s["noise_to_signal"] <= 1 for s in settings)
    assert [s["fits"] for s in settings] == sorted((s["fits"] for s in settings), reverse=True)


def test_over_selection_counts_and_settings_that_drown_in_noise_do_not_fit(cache: Path) -> None:
    done = plan(cache, "--json", "--epsilon", "3", "--max-noise", "0.05", "--set", "fleet.over_selection=1.3")
    found = json.loads(done.stdout)
    z = noise_multiplier(sampling_probability=0.0065, rounds=12, epsilon=3, delta=1e-6)
    assert (found["expected_cohort"], found["noise_multiplier"]) == (650, z)
    assert found["time"]["device_rounds"] == 12 * 13
    kept = [s["noise_to_signal"] <= 0.05 for s in found["settings"]]
    assert [s["fits"] for s in found["settings"]] == kept
    assert {tuple(s["misses"]) for s in found["settings"]} == {(), ("noise",)}


@pytest.mark.parametrize("sampler", ["uniform", "power", "top_k", "cyclic"])
def test_downloads_are_those_that_the_server_counts(sampler: str) -> None:
    config = load_config(None, [*CONFIG, f"trainable.embedding_rows.sampler={sampler}"])
    frequencies = 1 / np.arange(3.0, 903)
    frequencies /= frequencies.sum()
    full = build_trainable(empty_model(config, 900), config).spec
    sets = [row_set(config.trainable.embedding_rows, frequencies, seed=1, round_number=t) for t in range(1, 13)]
    meter = DownloadMeter(full, fleet_size=1, num_rounds=12)
    for number, ids in enumerate(sets[:-1], start=1):
        meter.changed(full.with_rows(ids), number)
    counted = int(meter.download(np.array([0]), full.with_rows(sets[-1]))[0])
    plan_parameters = PrivacyPlan.create(config.privacy, rounds=12, fleet_size=60, cohort=10, seed=1)
    predicted = payload(config, schedule_of(config, full, frequencies), frequencies, plan_parameters)
    assert predicted.down_first == pytest.approx(counted, rel=0.03)
    assert predicted.down_again <= predicted.down_first


def test_people_get_tables(cache: Path) -> None:
    done = plan(cache)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("noise-to-signal", "rows received", "median user", "asked"):
        assert word in done.stdout
    assert "note:" not in done.stdout


def test_a_forecast_says_that_it_is_not_of_example_level_dp(cache: Path) -> None:
    done = plan(cache, *(word for override in EXAMPLE_DP for word in ("--set", override)))
    assert (done.returncode, done.stderr) == (0, "")
    assert "of plain SGD; local.example_dp" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ram", "0"), "--ram"),
        (("--bandwidth", "nan"), "--bandwidth"),
        (("--set", "trainable.lora.rank=0", "--set", "trainable.embedding_rows.count=0"), "nothing trains"),
        (("/no/such.toml",), "does not exist"),
    ],
)
def test_wrong_input_is_one_line(words: tuple[str, ...], message: str, cache: Path) -> None:
    done = plan(cache, *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
