"""Wherever a run prints or stores an epsilon, the warnings that take it back stand with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import peft
import pytest
from safetensors import safe_open
from tiny_private_runs import TINY

from fedlm.cli.progress import sentence
from fedlm.cli.runs import _print_summary
from fedlm.config.schema import Config
from simulations.run import resume, simulate
from simulations.summary import RunSummary
from simulations.which_mechanism import compare_run

Make = Callable[..., Config]
CONFIGS = {
    "clean": ("privacy.reproducible_noise=false",),
    "reproducible": (),
    "mimicked": ("privacy.reproducible_noise=false", "privacy.population=1_000_000", "privacy.expected_cohort=5000",
                 "privacy.delta=1e-7"),
    "large delta": ("privacy.reproducible_noise=false", "privacy.delta=0.01"),
}  # fmt: skip
VERDICTS = {"reproducible": "NOT PRIVATE", "mimicked": "no guarantee for this model", "large delta": "weak guarantee"}
PRINTED = re.compile(r"epsilon \d")


@pytest.fixture(scope="module", params=CONFIGS)
def case(
    request: pytest.FixtureRequest, small: Make, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, RunSummary, list[dict[str, object]]]:
    """Return the verdict that belongs to a run (empty: none), its summary and its events; resumed at the end."""
    events: list[dict[str, object]] = []
    run = tmp_path_factory.mktemp("stamps") / "run"
    settings = (*TINY, "rounds=3", "execution.checkpoint_every=2", "privacy.reproducible_cohorts=false")
    simulate(small(*settings, *CONFIGS[request.param]), run, events.append)
    compare_run(run, epsilons=[3.0], max_vectors=1)
    return VERDICTS.get(request.param, ""), resume(run, events.append), events


def claims(value: Any, stamps: tuple[str, ...] | None = None) -> Iterator[tuple[str, float, tuple[str, ...] | None]]:
    """Yield every epsilon in nested values with the stamps beside it or around it; None: there are none."""
    if isinstance(value, dict):
        stamps = tuple(value["stamps"]) if "stamps" in value else stamps
        for name, inner in value.items():
            if name.startswith("epsilon") and name != "epsilon_target" and isinstance(inner, int | float):
                yield name, inner, stamps
            yield from claims(inner, stamps)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from claims(inner, stamps)


def stored(run: Path) -> Iterator[tuple[str, Any]]:
    """Yield every JSON value of a run folder that is no setting of the run itself."""
    for path in sorted(run.rglob("*.json*")):
        if path.name not in ("plan.json", "adapter_config.json"):
            texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            yield from ((path.name, json.loads(text)) for text in texts)


def test_every_stored_epsilon_has_its_stamps(case: tuple[str, RunSummary, list[dict[str, object]]]) -> None:
    verdict, summary, events = case
    files = set()
    for name, value in [*stored(Path(summary.run_dir)), *(("event", event) for event in events)]:
        for key, epsilon, stamps in claims(value):
            files.add(name)
            assert stamps is not None, f"{name}: {key} = {epsilon} is bare"
            assert [stamp.partition(":")[0] for stamp in stamps] == [verdict] * bool(verdict), name
    kept = {"metrics.jsonl", "ledger.jsonl", "privacy.json", "compare.json", "round_000003.json", "event"}
    assert files >= kept
    assert [stamp.partition(":")[0] for stamp in summary.stamps] == [verdict] * bool(verdict)


def test_every_printed_epsilon_has_its_stamps(
    case: tuple[str, RunSummary, list[dict[str, object]]], capsys: pytest.CaptureFixture[str]
) -> None:
    verdict, summary, events = case
    _print_summary(summary, json=False)
    printed = [line for line in capsys.readouterr().out.splitlines() if PRINTED.search(line)]
    live = [text for event in events if event["event"] == "round" and PRINTED.search(text := sentence(event))]
    card = (Path(summary.run_dir) / "adapter" / "README.md").read_text()
    headline = next(line for line in card.splitlines() if PRINTED.search(line))
    for lines, least in ((printed, 2), (live, 3), ([headline], 1)):
        assert len(lines) >= least
        assert all(verdict in line for line in lines)
        assert verdict or not any("[" in line for line in lines)


def test_every_part_of_the_report_that_tells_epsilon_tells_its_stamps(
    case: tuple[str, RunSummary, list[dict[str, object]]],
) -> None:
    verdict, summary, _ = case
    root = ElementTree.fromstring((Path(summary.run_dir) / "report.html").read_text(encoding="utf-8"))
    parts = [*root.findall(".//section"), *root.findall(".//section[@class='tiles']/div"), *root.iter("details")]
    texts = [" ".join(" ".join(part.itertext()).split()) for part in parts]
    telling = [text for text in texts if re.search(r"[Ee]psilon", text) and "Configuration" not in text]
    assert len(telling) >= 5  # tiles, epsilon's own, privacy, mechanisms, rounds
    for text in telling:
        assert verdict in text
        assert verdict or "\N{WARNING SIGN}" not in text


def test_an_adapter_carries_the_whole_statement_and_peft_still_reads_it(
    case: tuple[str, RunSummary, list[dict[str, object]]],
) -> None:
    _, summary, _ = case
    folder = Path(summary.run_dir) / "adapter"
    assert peft.LoraConfig.from_pretrained(str(folder)).r == 4
    figures = json.loads((folder / "privacy.json").read_text())
    assert figures["privacy_statement"] == summary.privacy_statement
    assert figures["delta"] == summary.delta
    card = (folder / "README.md").read_text()
    assert all(f"{stamp}." in card for stamp in summary.stamps)
    assert figures["unit"] in card
    with safe_open(folder / "adapter_model.safetensors", "np") as weights:
        assert weights.metadata()["privacy_statement"] == summary.privacy_statement
