"""Biases for models that have none (Llama): what bias-only training trains there, and as small an update vector.

y = W x  becomes  y = W x + b,  b = 0 at first: the function is unchanged until b trains.
"""

from __future__ import annotations

import torch
from torch import nn

_FACTORS = (".lora_A.", ".lora_B.")


def add_biases(model: nn.Module) -> list[str]:
    """Give every linear module of the body that has no bias one, zero at first, in place.

    Factors of adapters get none: they must stay the product that peft saves and merges.

    Arguments:
        model: Its linear modules are the body's; a language model's tables are no modules here.

    Returns:
        The names of the new parameters, in the order of the model.
    """
    added: list[str] = []
    for path, module in model.named_modules():
        if (
            type(module) is nn.Linear
            and module._parameters["bias"] is None
            and not any(f in f".{path}." for f in _FACTORS)
        ):
            weight = module.weight
            module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=weight.dtype, device=weight.device))
            added.append(f"{path}.bias")
    return added
