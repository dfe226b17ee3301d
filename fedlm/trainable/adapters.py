"""LoRA adapters as peft adapter folders: `adapter_config.json` and `adapter_model.safetensors`.

A folder that `fedlm.export.adapter` writes loads with `peft.PeftModel.from_pretrained(base, folder)` onto the stock
Hugging Face model of the same name, and a folder that peft wrote starts a run (`trainable.lora.adapter`).
"""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedlm.config.schema import LoraConfig
from fedlm.errors import DataError
from fedlm.models.base import LanguageModel

WEIGHTS = "adapter_model.safetensors"
ADAPTER_NAME = ".default"  # of the adapter inside the model; not part of the file's names
FILE_PREFIX = "base_model.model."


def inject_adapter(model: LanguageModel, config: LoraConfig) -> None:
    """Let peft wrap the target modules of `model`, in place."""
    peft.inject_adapter_in_model(peft_config(model.named_linear_targets(config.targets), config), model)


@torch.no_grad()
def load_adapter(model: LanguageModel, folder: Path) -> None:
    """Copy the factors of a peft adapter folder into a model with adapters injected.

    Raises:
        DataError: The folder cannot be read, or holds other modules or another rank than the config injected.
    """
    try:
        stored: dict[str, Tensor] = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise DataError(f"trainable.lora.adapter = {str(folder)!r} holds no {WEIGHTS} that can be read") from error
    found = {name.removeprefix(FILE_PREFIX): tensor for name, tensor in stored.items()}
    wanted = {name.replace(ADAPTER_NAME, ""): parameter for name, parameter in lora_factors(model).items()}
    if odd := sorted(found.keys() ^ wanted.keys()):
        raise DataError(
            f"trainable.lora.adapter = {str(folder)!r}: {odd[0]!r} is not in both the adapter and the model "
            f"({len(odd)} such); set trainable.lora.targets to the adapter's target_modules"
        )
    for name, parameter in wanted.items():
        if parameter.shape != found[name].shape:
            raise DataError(
                f"trainable.lora.adapter = {str(folder)!r}: {name!r} is {tuple(found[name].shape)}, the model takes "
                f"{tuple(parameter.shape)}; set trainable.lora.rank to the adapter's r"
            )
        parameter.copy_(found[name])


def peft_config(targets: list[str], config: LoraConfig) -> peft.LoraConfig:
    """Return the settings with which peft wraps some target modules."""
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # declared int, but only ever divided by the rank
        target_modules=targets,
        task_type=peft.TaskType.CAUSAL_LM,
    )


def lora_factors(model: LanguageModel) -> dict[str, nn.Parameter]:
    """Return the factors A and B of every adapter in a model, by the names of their parameters."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
