"""All weights of a model by name, as numpy arrays, and back, without a copy where that is wanted.

A worker that simulates devices maps the frozen weights from an object store or a safetensors file. Such
memory is read-only, and torch has no notion of that: writing into it in place ends the process. *Frozen means
frozen*: tensors set without a copy get `requires_grad = False`; whoever trains one calls `thaw` first.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedlm.errors import DataError
from fedlm.models.base import LanguageModel

Array = npt.NDArray[Any]
_TABLES = ("input_table", "output_table", "output_bias")
_FIX = "use weights saved from a model of this shape"


def weights(model: LanguageModel) -> dict[str, Array]:
    """Return every weight by name: the tables under their attribute names, then the body's `state_dict`.

    Arguments:
        model: A model without adapters.

    Returns:
        Views of the model's memory (copies if it is on an accelerator): change one and you change the model.
        A tied model has no "output_table", a model without output bias no "output_bias".
    """
    return {name: tensor.detach().cpu().numpy() for name, tensor in _tensors(model).items()}


def in_order(file: bytes) -> bytes:
    """Return a safetensors file with its metadata in alphabetical order: the library's own order is another each time.

    So equal weights are equal files.
    """
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def set_weights(model: LanguageModel, arrays: Mapping[str, Array], copy: bool = False) -> None:
    """Give a model all its weights, by the names of `weights`.

    Arguments:
        model: A model of the same architecture, without adapters.
        arrays: Of the shapes and types of the model's tensors (float32, as a rule).
        copy: False: the model's tensors become views of the arrays, parameters with `requires_grad = False`.
            True: values are copied into the model's own memory.

    Raises:
        DataError: A name is missing or unknown, or a shape or type differs; the model is then unchanged.
    """
    old = _tensors(model)
    _check_names(old, arrays)
    new = {name: frozen_tensor(arrays[name]) for name in old}
    for name in old:
        _check_fit(name, old[name], new[name])
    if copy:
        with torch.no_grad():
            for name in old:
                old[name].copy_(new[name])
    else:
        _attach(model, new)


def thaw(parameter: nn.Parameter) -> nn.Parameter:
    """Give a parameter writable memory of its own and let it train; returns the same object."""
    parameter.data = parameter.data.clone()
    parameter.requires_grad_(True)
    return parameter


def frozen_tensor(array: Array) -> Tensor:
    """Return a tensor that shares the array's memory, read-only memory included; never write into it.

    torch warns of read-only arrays because nothing stops a write in place, which would end the process.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
        return torch.from_numpy(array)


def _tensors(model: LanguageModel) -> dict[str, Tensor]:
    tables: dict[str, Tensor] = {"input_table": model.input_table}
    if not model.tied:
        tables["output_table"] = model.output_table
    if model.output_bias is not None:
        tables["output_bias"] = model.output_bias
    return {**tables, **model.state_dict()}


def _attach(model: LanguageModel, tensors: Mapping[str, Tensor]) -> None:
    model.set_tables(**{name: tensors[name] for name in _TABLES if name in tensors})
    parameters = dict(model.body_parameters())
    for name in tensors.keys() - set(_TABLES):
        if name in parameters:
            parameters[name].requires_grad_(False)
            parameters[name].data = tensors[name]
        else:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path).register_buffer(leaf, tensors[name])


def _check_names(wanted: Mapping[str, Tensor], given: Mapping[str, Array]) -> None:
    if missing := [name for name in wanted if name not in given]:
        raise DataError(f"weight '{missing[0]}' is missing ({len(missing)} in all); {_FIX}")
    if unknown := [name for name in given if name not in wanted]:
        near = get_close_matches(unknown[0], wanted, n=1)
        hint = f"did you mean '{near[0]}'?" if near else _FIX
        raise DataError(f"weight '{unknown[0]}' is not one of this model's ({len(unknown)} in all); {hint}")


def _check_fit(name: str, old: Tensor, new: Tensor) -> None:
    if new.shape != old.shape or new.dtype != old.dtype:
        found, wanted = (f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (new, old))
        raise DataError(f"weight '{name}' is {found}; this model takes {wanted}; {_FIX}")
