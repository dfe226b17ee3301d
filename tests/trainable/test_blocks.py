"""The blocks that a node keeps: its own memory or a private mapping, never anybody else's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedlm.config.load import load_config
from fedlm.config.schema import Config
from fedlm.models.factory import build_model, empty_model
from fedlm.models.weights import set_weights, weights
from fedlm.pretraining.cache import WEIGHTS, base_folder, load_base, save_base
from fedlm.trainable.build import Trainable, build_trainable

V = 50


@pytest.fixture
def based(tmp_path: Path) -> Config:
    """An untied experiment whose base lies in a folder."""
    c = load_config(None, [
        f"vocabulary.size={V}", "model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.tied=false",
        "trainable.lora.rank=2", "trainable.bias=true", "trainable.embedding_rows.count=20", "loss.negatives=20",
        "pretrain.negatives=20", f"model.base={tmp_path / 'base'}",
    ])  # fmt: skip
    save_base(c, weights(build_model(c, np.full(V, 1 / V), 1)), {})
    return c


def mapped(c: Config) -> Trainable:
    model = empty_model(c, V)
    set_weights(model, load_base(c))
    return build_trainable(model, c)


@pytest.mark.parametrize("copy_tables", [True, False])
def test_a_patch_reaches_this_nodes_model_and_nothing_else(based: Config, copy_tables: bool) -> None:
    """Two nodes map one base: what one writes is seen by its own model, not by the other, and not by the file."""
    file = base_folder(based) / WEIGHTS
    on_disk = file.read_bytes()
    mine, other = mapped(based), mapped(based)
    before = mine.initial_values()
    blocks = mine.initial_blocks(copy_tables=copy_tables)
    mine.bind_tables(blocks)
    spec = mine.spec.with_rows(np.array([0, 7, 49]))
    patch = np.arange(spec.size, dtype=np.float32)
    spec.scatter_blocks(blocks, patch)
    expected = before.copy()
    spec.scatter(expected, patch)
    for name, view in mine.spec.views(expected).items():
        assert np.array_equal(blocks[name], view), name
    assert np.array_equal(mine.model.input_table.numpy(), blocks["input_table"])
    assert np.array_equal(mine.model.output_table.numpy(), blocks["output_table"])
    assert np.array_equal(other.initial_values(), before)
    assert file.read_bytes() == on_disk


def test_only_tables_are_ever_shared_with_the_model(based: Config) -> None:
    """Trained tensors move while a device trains, so their current values must be copies; tables may be the model's."""
    trainable = mapped(based)
    shared = trainable.initial_blocks(copy_tables=False)
    copied = trainable.initial_blocks(copy_tables=True)
    table = trainable.model.input_table.numpy()
    assert np.shares_memory(shared["input_table"], table)
    assert not np.shares_memory(copied["input_table"], table)
    for name, parameter in trainable.parameters.items():
        assert not np.shares_memory(shared[name], parameter.detach().numpy()), name
