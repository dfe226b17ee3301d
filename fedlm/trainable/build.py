"""What trains in a model: LoRA adapters, biases, dense tensors and embedding rows become one `UpdateSpec`.

LoRA (Hu et al. 2021, arXiv 2106.09685) comes from peft: `W x + (alpha / R) B A x`, A (R, in), B (out, R), B zero at
first. With `freeze_a` (FFA-LoRA, Sun et al. 2024) only B trains: half the payload, and the mean of the devices' B is
exact because A is common to all.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedlm.config.schema import Config, LoraConfig
from fedlm.errors import ConfigError
from fedlm.models.base import LanguageModel
from fedlm.models.table_names import INPUT_TABLE, OUTPUT_BIAS, OUTPUT_TABLE
from fedlm.models.weights import thaw
from fedlm.randomness import seed_key, stream
from fedlm.trainable.adapters import inject_adapter, load_adapter
from fedlm.trainable.added_biases import add_biases
from fedlm.trainable.spec import BlockKind, UpdateSpec, Vector


@dataclass(frozen=True)
class Trainable:
    """A model and what trains in it.

    Arguments:
        model: With adapters injected; every tensor outside `parameters` is frozen.
        parameters: The trained tensors of the body, by block name.
        spec: The full spec: `parameters`, then the tables if embedding rows train.
    """

    model: LanguageModel
    parameters: Mapping[str, nn.Parameter]
    spec: UpdateSpec

    def initial_values(self) -> Vector:
        """Return the full vector (P_full,) of the model as it stands."""
        values = np.empty(self.spec.size, np.float32)
        for name, view in self.spec.views(values).items():
            view[...] = self._current(name)
        return values

    def initial_blocks(self, *, copy_tables: bool) -> dict[str, Vector]:
        """Return every block of the full spec as the model stands, writable, for a node that keeps it up to date.

        Arguments:
            copy_tables: False: the tables are the model's own memory, of which no copy is made; right when nobody
                else uses it. Mapped from the base's file they cost no memory but for the pages read or written.
        """
        row_names = {block.name for block in self.spec.row_blocks}
        return {
            block.name: np.array(self._current(block.name), copy=copy_tables or block.name not in row_names or None)
            for block in self.spec.blocks
        }

    def _current(self, name: str) -> Vector:
        model = self.model
        tables = {INPUT_TABLE: model.input_table, OUTPUT_TABLE: model.output_table, OUTPUT_BIAS: model.output_bias}
        tensor = self.parameters[name] if name in self.parameters else tables[name]
        assert tensor is not None, f"{name} is in the spec of a model that lacks it"
        return tensor.detach().numpy()

    def bind_tables(self, blocks: Mapping[str, Vector]) -> None:
        """Make the model read its trainable tables straight from these blocks, sharing their memory."""
        views = {b.name: torch.from_numpy(blocks[b.name]) for b in self.spec.row_blocks}
        if views:
            self.model.set_tables(
                input_table=views[INPUT_TABLE],
                output_table=views.get(OUTPUT_TABLE),
                output_bias=views.get(OUTPUT_BIAS),
            )

    @torch.no_grad()
    def load(self, values: Mapping[str, Vector]) -> None:
        """Copy block values into the body's trained tensors."""
        for name, parameter in self.parameters.items():
            parameter.copy_(torch.from_numpy(values[name]))


def build_trainable(model: LanguageModel, config: Config) -> Trainable:
    """Add biases, inject adapters, freeze the rest, and lay out the update vector.

    Raises:
        ConfigError: A pattern of `trainable.dense` matches nothing, `trainable.bias` finds no bias, or nothing at all
            trains.
    """
    if config.trainable.added_biases:
        add_biases(model)
    body = dict(model.body_parameters())
    kinds: dict[str, BlockKind] = dict.fromkeys(_dense_names(body, config.trainable.dense), "dense")
    if config.trainable.bias:
        kinds |= dict.fromkeys(_bias_names(body), "bias")
    originals = {id(p): name for name, p in body.items()}
    if config.trainable.lora.rank:
        _start_adapter(model, config.trainable.lora, config.seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters: dict[str, nn.Parameter] = {}
    parts: list[tuple[str, BlockKind, tuple[int, ...]]] = []
    for name, parameter in model.body_parameters():
        kind = _lora_kind(name, config.trainable.lora.freeze_a) or kinds.get(originals.get(id(parameter), ""))
        if kind is not None:
            parameters[name] = thaw(parameter)
            parts.append((name, kind, tuple(parameter.shape)))
    if config.trainable.embedding_rows.count:
        parts += _row_parts(model)
    if not parts:
        raise ConfigError(
            "nothing trains: trainable has no LoRA rank, bias, dense tensor or embedding row that this model has"
        )
    return Trainable(model, parameters, UpdateSpec.build(parts))


def _row_parts(model: LanguageModel) -> list[tuple[str, BlockKind, tuple[int, ...]]]:
    shape = (model.vocabulary_size, model.d_model)
    parts: list[tuple[str, BlockKind, tuple[int, ...]]] = [(INPUT_TABLE, "rows", shape)]
    if not model.tied:
        parts.append((OUTPUT_TABLE, "rows", shape))
    if model.output_bias is not None:
        parts.append((OUTPUT_BIAS, "rows", shape[:1]))
    return parts


def _bias_names(body: Mapping[str, nn.Parameter]) -> list[str]:
    names = [name for name in body if name.rpartition(".")[2] == "bias"]
    if not names:
        raise ConfigError("trainable.bias is true and the model has no bias; set trainable.added_biases = true")
    return names


def _dense_names(body: Mapping[str, nn.Parameter], patterns: tuple[str, ...]) -> list[str]:
    names: list[str] = []
    for pattern in patterns:
        found = fnmatch.filter(body, pattern)
        if not found:
            raise ConfigError(f"trainable.dense pattern {pattern!r} matches no tensor; there are {', '.join(body)}")
        names += found
    return names


def _lora_kind(name: str, freeze_a: bool) -> BlockKind | None:
    if ".lora_A." in name:
        return None if freeze_a else "lora_a"
    return "lora_b" if ".lora_B." in name else None


def _start_adapter(model: LanguageModel, config: LoraConfig, seed: int) -> None:
    """Inject adapters; draw A from the experiment's own stream instead of torch's global one, or load both factors."""
    inject_adapter(model, config)
    if config.adapter:
        return load_adapter(model, Path(config.adapter))
    key = seed_key(seed)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter.shape[1])  # peft's kaiming_uniform with a = sqrt(5)
            draw = stream(key, f"lora/{name}").uniform(-bound, bound, tuple(parameter.shape))
            parameter.data.copy_(torch.from_numpy(draw.astype(np.float32)))
    return None
