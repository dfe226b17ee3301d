"""Public bases: the weights that a federated run starts from, in a folder named by the hash of what made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy.typing as npt
import safetensors
import safetensors.torch
import torch

from fedlm.config.schema import Config
from fedlm.data.cache import cache_folder, content_key, publish_folder
from fedlm.errors import DataError

WEIGHTS, META = "model.safetensors", "base.json"
_FORMAT = 2  # of the weights' names; another number keeps bases of other versions apart


def base_folder(config: Config) -> Path:
    """Return where this config's base lies: the folder that it names, or the cache entry of what would train it."""
    if config.model.base != "pretrain":
        return Path(config.model.base)
    made_by = asdict(config)
    kept = {name: made_by[name] for name in ("seed", "data", "vocabulary", "model", "pretrain")}
    kept["format"] = _FORMAT
    if config.data.corpus == "synthetic":
        kept["synthetic"] = made_by["synthetic"]
    del (
        kept["model"]["base"],
        kept["model"]["dropout"],
        kept["data"]["cache_dir"],
        kept["data"]["max_eval_tokens"],
    )
    return cache_folder(config) / "bases" / content_key(kept)


def has_base(config: Config) -> bool:
    """Tell whether the base is there, whole."""
    return (base_folder(config) / META).is_file()


def load_base(config: Config) -> dict[str, npt.NDArray[Any]]:
    """Return the base's weights, memory-mapped and private: whoever writes into them changes only what it sees itself.

    Raises:
        DataError: The folder holds no base.
    """
    folder = base_folder(config)
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(
            f"model.base = {config.model.base!r}: {folder} holds no {WEIGHTS} that can be read; "
            "run `fedlm pretrain`, or set model.base to pretrain, random or a base folder"
        ) from error
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def save_base(config: Config, weights: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> Path:
    """Write a base atomically: a reader finds a whole folder or none. Returns the folder."""
    folder = base_folder(config)
    tensors = {name: torch.from_numpy(a).contiguous() for name, a in weights.items()}
    with publish_folder(folder) as building:
        # Not `save_file`: it reports a full disk as an error of its own without a number, and ignores the umask.
        (building / WEIGHTS).write_bytes(safetensors.torch.save(tensors))
        (building / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return folder
