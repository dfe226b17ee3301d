"""docs/example_dp.md: its example runs, its noise costs the epsilon beside it, and every test that it cites exists."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm.privacy.accounting.subsampled_gaussian import epsilon

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "example_dp.md").read_text()


def test_the_example_runs_and_spends_what_it_was_given() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        exec(blocks[0], names)
    plan = names["plan"]
    assert 2.99 < plan.epsilon(plan.num_steps) <= 3.0
    assert any((bias != 0).any() for name, bias in names["task"].model.named_parameters() if name == "1.bias")


def noise_rows() -> list[list[float]]:
    cells = (line.strip("|").replace(",", "").split("|") for line in PAGE.splitlines() if re.match(r"\| \d", line))
    return [[float(cell) for cell in row] for row in cells if len(row) == 6]


@pytest.mark.parametrize("row", noise_rows(), ids=str)
def test_noise_costs_the_epsilon_beside_it(row: list[float]) -> None:
    n, batch_size, steps, delta, wanted, z = row
    at = partial(epsilon, sampling_probability=batch_size / n, rounds=int(steps), delta=delta)
    assert at(noise_multiplier=z + 6e-4) < wanted < at(noise_multiplier=z - 6e-4)


def test_every_cited_test_exists() -> None:
    cited = set(re.findall(r"`(test_\w+)`", PAGE))
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(cited) > 30
    assert len(noise_rows()) == 4
    assert sorted(name for name in cited if f"def {name}(" not in sources) == []
