"""What exact per-example gradients are refused for, with the names of module and parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedlm.errors import ConfigError
from fedlm.example_dp.layers.hooks import Watched, module_kind

_KNOWN = "Linear, Conv1D, LayerNorm, plain RMSNorm, Embedding and Positions"


def watched_modules(model: nn.Module, trained: Mapping[str, Tensor]) -> list[Watched]:
    """Return the modules of `model` that directly own trained parameters.

    Raises:
        ConfigError: A trained parameter that no tap knows how to follow: its module is of another kind, several modules
            share it, it is not float32 or float64.
    """
    names = {id(tensor): name for name, tensor in trained.items()}
    owners: dict[int, str] = {}
    watched = []
    for path, module in model.named_modules():
        mine = {local: p for local, p in module._parameters.items() if p is not None and id(p) in names}
        for local, parameter in mine.items():
            name, here = names[id(parameter)], f"{path}.{local}".removeprefix(".")
            if (other := owners.setdefault(id(parameter), here)) != here:
                raise ConfigError(
                    f"trained parameter '{name}' is shared by '{other}' and '{here}', and the norm of its gradient "
                    "needs both together; freeze it (tied embeddings of a language model train as its tables)"
                )
            _check_parameter(name, path, module, parameter)
        if mine:
            watched.append(Watched(path, module, mine, {local: names[id(p)] for local, p in mine.items()}))
    _check_names(model, trained, owners)
    return watched


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the model's BatchNorms by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, _BatchNorm)}


def refuse_batch_statistics(batch_norms: Mapping[str, _BatchNorm]) -> None:
    """Refuse modules through which one example's activations depend on the others'; asked before every pass.

    Raises:
        ConfigError: A BatchNorm in training mode, or without frozen statistics.
    """
    for path, module in batch_norms.items():
        if module.training or not module.track_running_stats:
            raise ConfigError(
                f"module '{path}' ({type(module).__name__}) mixes the examples of a batch; call its eval() with frozen "
                "statistics, or use GroupNorm or LayerNorm"
            )


def _check_parameter(name: str, path: str, module: nn.Module, parameter: nn.Parameter) -> None:
    if parameter.dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"trained parameter '{name}' is {parameter.dtype}; use float32")
    if module_kind(module) is None:
        raise ConfigError(
            f"trained parameter '{name}' is in '{path}', a {type(module).__name__}; per-example gradients are known "
            f'for {_KNOWN}: freeze it, or use finetune.example_dp.engine = "opacus"'
        )
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        raise ConfigError(f"embedding '{path}' has max_norm or scale_grad_by_freq, which mix examples; switch them off")


def _check_names(model: nn.Module, trained: Mapping[str, Tensor], owners: Mapping[int, str]) -> None:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in trained.items():
        if name in parameters and id(tensor) not in owners:
            raise ConfigError(f"trained['{name}'] is not the model's parameter of that name; take it from the model")
