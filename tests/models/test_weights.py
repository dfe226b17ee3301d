"""Weights by name, with and without a copy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from small_models import KINDS, ModelMaker

from fedlm.errors import DataError
from fedlm.models.base import LanguageModel
from fedlm.models.weights import set_weights, thaw, weights

TOKENS = torch.arange(24).view(2, 12)


def read_only(arrays: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """The same arrays from files mapped for reading only, as an object store hands them out."""
    mapped = {}
    for number, (name, array) in enumerate(arrays.items()):
        np.save(folder / f"{number}.npy", array)
        mapped[name] = np.load(folder / f"{number}.npy", mmap_mode="r")
    return mapped


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_over_mapped_memory_computes_the_same_without_a_copy(
    make_model: ModelMaker, kind: str, tied: bool, tmp_path: Path
) -> None:
    source, target = make_model(kind, tied=tied, seed=1), make_model(kind, tied=tied, seed=2)
    assert not torch.allclose(source.hidden(TOKENS), target.hidden(TOKENS))
    arrays = read_only(weights(source), tmp_path)
    set_weights(target, arrays)
    torch.testing.assert_close(target.hidden(TOKENS), source.hidden(TOKENS), rtol=0, atol=0)
    assert not any(parameter.requires_grad for _, parameter in target.body_parameters())
    for name, array in weights(target).items():
        assert np.shares_memory(array, arrays[name]), name


def test_views_follow_the_arrays_and_copies_do_not(model: LanguageModel) -> None:
    arrays = {name: array.copy() for name, array in weights(model).items()}
    set_weights(model, arrays, copy=True)
    arrays["input_table"] += 1
    assert not np.array_equal(model.input_table.numpy(), arrays["input_table"])
    assert all(parameter.requires_grad for _, parameter in model.body_parameters())
    set_weights(model, arrays)
    arrays["input_table"] += 1
    np.testing.assert_array_equal(model.input_table.numpy(), arrays["input_table"])


def test_a_thawed_parameter_trains_and_its_source_stays(make_model: ModelMaker, tmp_path: Path) -> None:
    model = make_model("transformer")
    arrays = read_only(weights(model), tmp_path)
    before = arrays["norm.bias"].copy()
    set_weights(model, arrays)
    bias = thaw(dict(model.body_parameters())["norm.bias"])
    model.hidden(TOKENS).sum().backward()
    assert bias.grad is not None
    with torch.no_grad():
        bias.sub_(bias.grad)
    np.testing.assert_array_equal(arrays["norm.bias"], before)
    assert not np.array_equal(weights(model)["norm.bias"], before)
    assert [name for name, p in model.body_parameters() if p.grad is not None] == ["norm.bias"]


def test_names_survive_a_safetensors_file(model: LanguageModel, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    save_file(weights(model), tmp_path / "weights.safetensors")
    before = model.hidden(TOKENS)
    set_weights(model, load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(model.hidden(TOKENS), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.bias": None}, r"weight 'norm\.bias' is missing"),
        ({"norm.bais": np.zeros(16, np.float32)}, r"'norm\.bais' is not .* did you mean 'norm\.bias'\?"),
        ({"norm.bias": np.zeros(17, np.float32)}, r"'norm\.bias' is \(17,\) .* takes \(16,\)"),
        ({"norm.bias": np.zeros(16, np.float64)}, r"float64"),
        ({"output_table": np.zeros((61, 16), np.float32)}, r"'output_table' is not one of"),
    ],
)
def test_weights_of_another_model_are_refused_whole(
    make_model: ModelMaker, change: dict[str, np.ndarray | None], message: str
) -> None:
    model = make_model("transformer")
    before = {name: array.copy() for name, array in weights(model).items()}
    wanted = {name: array + 1 for name, array in before.items()} | change
    given = {name: array for name, array in wanted.items() if array is not None}
    with pytest.raises(DataError, match=message):
        set_weights(model, given)
    for name, array in weights(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_the_models_import_without_transformers() -> None:
    code = (
        "import sys, fedlm.models.factory, fedlm.models.pretrained; "
        "sys.exit(any(m in sys.modules for m in ('transformers', 'peft', 'flwr', 'ray')))"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
