"""LoRA adapters as peft adapter folders to be given away, and beside them what their training guarantees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from fedlm.config.schema import LoraConfig
from fedlm.export.model_card import write_model_card
from fedlm.models.base import LanguageModel
from fedlm.models.weights import in_order
from fedlm.privacy.guarantee import Guarantee
from fedlm.trainable.adapters import ADAPTER_NAME, FILE_PREFIX, WEIGHTS, lora_factors, peft_config
from fedlm.trainable.spec import Vector


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
    for name, parameter in lora_factors(model).items():
        tensor = torch.from_numpy(np.array(values[name])) if name in values else parameter.detach().clone()
        tensors[FILE_PREFIX + name.replace(ADAPTER_NAME, "")] = tensor
        targets.add(name.partition(".lora_")[0])
    folder.mkdir(parents=True, exist_ok=True)
    settings = peft_config(sorted(targets), config)
    settings.base_model_name_or_path = base
    settings.inference_mode = True
    if not causal:
        settings.task_type = None
    settings.save_pretrained(str(folder))
    # Not `save_file`: whatever the umask says, the file would be its owner's alone, and an adapter is to be published.
    metadata = {"format": "pt", "privacy_statement": guarantee.statement}
    (folder / WEIGHTS).write_bytes(in_order(save(tensors, metadata=metadata)))
    write_model_card(folder, guarantee)
