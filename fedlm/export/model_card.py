"""The privacy of a model in the folder that is given away: a model card for people, `privacy.json` for programs."""

from __future__ import annotations

import json
from pathlib import Path

from fedlm.privacy.guarantee import Guarantee, to_dict, to_lines

CARD, FIGURES = "README.md", "privacy.json"


def write_model_card(folder: Path, guarantee: Guarantee) -> None:
    """Write the whole guarantee into a folder of weights; peft and transformers leave both files alone.

    Arguments:
        folder: Exists already.
        guarantee: Of the run that trained the weights.
    """
    headline, *lines = to_lines(guarantee)
    title = "# Trained with fedlm\n\n## Privacy\n"
    text = [title, f"**{headline}**", f"Unit: {guarantee.unit}; adjacency: {guarantee.adjacency}.", *lines]
    (folder / CARD).write_text("\n\n".join(text) + "\n", encoding="utf-8")
    figures = json.dumps(to_dict(guarantee), indent=2, allow_nan=False)
    (folder / FIGURES).write_text(figures + "\n", encoding="utf-8")
