"""`fedlm privacy`: every mechanism and sampler from the command line, in this process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from fedlm.cli.app import app
from fedlm.errors import ConfigError, DataError, OutputError
from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.rounding import rounded_up

FLEET = ["--population", "2000", "--cohort", "100", "--rounds", "60", "--delta", "1e-6"]


def run(*words: str) -> str:
    done = CliRunner().invoke(app, ["privacy", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def answer(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*words, "--json"))
    return found


def test_defaults_are_the_poisson_sampled_gaussian() -> None:
    spent = subsampled_gaussian.epsilon(sampling_probability=0.05, noise_multiplier=1.2, rounds=60, delta=1e-6)
    above = math.ceil(spent * 1e4) / 1e4
    assert run("epsilon", *FLEET, "--noise-multiplier", "1.2") == (
        f"epsilon {above:.4f}\n({rounded_up(spent)}, 1e-06)-differentially private for each user (add or remove one): "
        "Gaussian noise of multiplier 1.2 in each of 60 rounds, about 100 of 2000 users Poisson-sampled in each; "
        "PLD accounting.\n"
    )


@pytest.mark.parametrize(
    "options",
    [
        "--sampler truncated_poisson --cap 120",
        "--sampler fixed --max-participations 4",
        "--sampler separated --min-separation 10",
        "--mechanism blt --option buffers=3",
        "--mechanism banded --option bands=4",
        "--mechanism banded --sampler separated --option bands=4 --min-separation 8",
        "--mechanism tree --min-separation 20",
        "--mechanism local --max-participations 3",
    ],
)
def test_calibrated_noise_spends_its_epsilon(options: str) -> None:
    words = [*FLEET, *options.split()]
    noise = answer("calibrate", *words, "--epsilon", "3")["noise_multiplier"]
    spent = answer("epsilon", *words, "--noise-multiplier", str(noise))
    assert 3 * (1 - 1e-3) <= spent["epsilon"] <= 3 * (1 + 1e-9)
    assert "noise multiplier" in spent["privacy_statement"]


def test_what_gives_more_knowledge_to_the_observer_costs_more() -> None:
    spent = {
        words: answer("epsilon", *FLEET, "--noise-multiplier", "2", *words.split())["epsilon"]
        for words in ("", "--sampler truncated_poisson --cap 120", "--sampler separated", "--sampler fixed")
    }
    assert spent[""] < spent["--sampler truncated_poisson --cap 120"] < spent["--sampler fixed"]
    assert spent["--sampler separated"] < spent["--sampler fixed"]


def test_skellam_tells_both_guarantees() -> None:
    found = answer("calibrate", *FLEET, "--mechanism", "skellam", "--size", "5000", "--epsilon", "3")
    assert found["epsilon_server"] > 3
    assert f"{found['bits']} bits a coordinate" in found["privacy_statement"]
    words = ["--mechanism", "skellam", "--size", "5000", "--noise-multiplier", str(found["noise_multiplier"])]
    assert 2.9 <= answer("epsilon", *FLEET, *words)["epsilon"] <= 3
    turns = answer("epsilon", *FLEET, *words, "--sampler", "separated")
    assert turns["epsilon"] == pytest.approx(turns["epsilon_server"], rel=0.5)  # nothing amplifies


@pytest.mark.parametrize("delta", ["0.0005", "0.01"])  # 1 / 2,000 users, and above
@pytest.mark.parametrize(
    "words",
    [
        ("epsilon", "--noise-multiplier", "1.2"),
        ("calibrate", "--epsilon", "3"),
        ("compare", "--epsilon", "3", "--max-vectors", "1"),
    ],
)
def test_a_delta_at_which_whole_users_may_be_published_is_refused_unless_asked_for(
    words: tuple[str, ...], delta: str
) -> None:
    large = [*words, *FLEET[:-1], delta]
    with pytest.raises(ConfigError, match=r"is not below 1 / --population 2000 = 0\.0005.*--allow-large-delta"):
        run(*large)
    (stamp,) = answer(*large, "--allow-large-delta")["stamps"]
    assert stamp.startswith(f"weak guarantee: delta {delta} is not below 1 / 2,000 users")
    assert stamp in run(*large, "--allow-large-delta")
    assert answer(*words, *FLEET[:-1], "0.000499")["stamps"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--mechanism gauss", "privacy.mechanism = 'gauss' is unknown; did you mean 'gaussian'?"),
        ("--mechanism tree --sampler poisson", "does not go with"),
        ("--cap 120", "--cap 120 has no meaning"),
        ("--sampler truncated_poisson", "cap"),
        ("--mechanism banded", "privacy.options.bands"),
        ("--min-separation 30 --sampler separated", "privacy.min_separation = 30"),
        ("--mechanism skellam --sampler cyclic_poisson", "does not go with"),
    ],
)
def test_impossible_combinations_say_what_is_wrong(options: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run("epsilon", *FLEET, "--noise-multiplier", "1", *options.split())


def test_compare_prints_rows_advice_and_a_plot(tmp_path: Path) -> None:
    words = ["compare", *FLEET, "--epsilon", "1", "--epsilon", "8", "--max-vectors", "3"]
    drawing = tmp_path / "noise.svg"
    found = answer(*words, "--plot", str(drawing))
    assert {row["epsilon"] for row in found["rows"]} == {1, 8}
    assert len(found["advice"]) == 2
    root = ElementTree.fromstring(drawing.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(root.findall(".//{*}path[@class='line']")) == 6  # every mechanism but local noise
    table = run(*words)
    assert found["advice"][1] in table
    assert "needs" in table.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (FLEET[2:], "--population missing"),
        ([], "--population, --cohort, --rounds, --delta missing"),
        ([*FLEET, "--run", "x"], "--run x has its own --population, --cohort, --rounds, --delta"),
        (["--run", "/no/such/run"], "is not a run folder"),
    ],
)
def test_compare_takes_numbers_or_a_run(words: list[str], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        run("compare", *words)


def test_a_plot_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        run("compare", *FLEET, "--epsilon", "1", "--max-vectors", "1", "--plot", str(tmp_path / "no" / "a.svg"))
