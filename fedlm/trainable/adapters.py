"""LoRA adapters as peft adapter folders: `adapter_config.json` and `adapter_model.safetensors`, and beside them what
their training guarantees.

A folder written here loads with `peft.PeftModel.from_pretrained(base, folder)` onto the stock Hugging Face model of the
same name, and a folder that peft wrote starts a run (`trainable.lora.adapter`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fedlm.config.schema import LoraConfig
from fedlm.errors import DataError
from fedlm.export.model_card import write_model_card
from fedlm.models.base import LanguageModel
from fedlm.models.weights import in_order
from fedlm.privacy.guarantee import Guarantee
from fedlm.trainable.spec import Vector

WEIGHTS = "adapter_model.safetensors"
_NAME = ".default"  # of the adapter inside the model; not part of the file's names
_PREFIX = "base_model.model."


def inject_adapter(model: LanguageModel, config: LoraConfig) -> None:
    """Let peft wrap the target modules of `model`, in place."""
    peft.inject_adapter_in_model(_peft_config(model.named_linear_targets(config.targets), config), model)


def save_adapter(
    model: LanguageModel,
    values: Mapping[str, Vector],
    config: LoraConfig,
    folder: Path,
    *,
    base: str,
    guarantee: Guarantee,
    causal: bool = True,
) -> None:
    """Write the adapter of a model as a peft adapter folder.

    Arguments:
        model: With adapters injected.
        values: Trained blocks by name; factors that are not among them (a frozen A) are taken from the model.
        config: The LoRA section that injected them.
        folder: Made if missing.
        base: What the adapter adapts, for the reader.
        guarantee: Of the run that trained it; the folder carries it in full, so that it can be given away.
        causal: False: the model is an encoder, and peft is to wrap it as a plain model.
    """
    targets, tensors = set(), {}
    for name, parameter in _factors(model).items():
        tensor = torch.from_numpy(np.array(values[name])) if name in values else parameter.detach().clone()
        tensors[_PREFIX + name.replace(_NAME, "")] = tensor
        targets.add(name.partition(".lora_")[0])
    folder.mkdir(parents=True, exist_ok=True)
    settings = _peft_config(sorted(targets), config)
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    if not causal:
        settings.task_type = None
    settings.save_pretrained(str(folder))
    # Not `save_file`: whatever the umask says, the file would be its owner's alone, and an adapter is to be published.
    metadata = {"format": "pt", "privacy_statement": guarantee.statement}
    (folder / WEIGHTS).write_bytes(in_order(save(tensors, metadata=metadata)))
    write_model_card(folder, guarantee)


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
    found = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
    wanted = {name.replace(_NAME, ""): parameter for name, parameter in _factors(model).items()}
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


def _peft_config(targets: list[str], config: LoraConfig) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # declared int, but only ever divided by the rank
        target_modules=targets,
        task_type=peft.TaskType.CAUSAL_LM,
    )


def _factors(model: LanguageModel) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
