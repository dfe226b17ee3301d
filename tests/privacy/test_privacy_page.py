"""The example of docs/privacy.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

PAGE = Path(__file__).resolve().parents[2] / "docs" / "privacy.md"


def test_the_example_runs_and_spends_what_it_was_given() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    update = np.full(1_000, 1e-3, np.float32)
    names: dict[str, Any] = {"update_of": lambda device: update}
    exec(blocks[0], names)
    plan, values = names["plan"], names["values"]
    assert 1.99 < plan.epsilon(plan.rounds) <= 2.0
    assert names["state"].clip_norm < 1.0, "every update was below it"
    assert np.isfinite(values).all()
    assert np.ptp(values) > 0
