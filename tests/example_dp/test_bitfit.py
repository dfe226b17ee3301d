"""DP-BiTFiT keeps no activation for the biases, and models without biases get some that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from brute_force import task_of
from test_per_example_engine import CHOICES, llama, own_loss, randomise, text, transformer
from torch import Tensor, nn

from fedlm.config.load import load_config
from fedlm.config.schema import Config
from fedlm.errors import ConfigError
from fedlm.example_dp.clip_rule import ClipRule
from fedlm.example_dp.engine import PerExampleEngine
from fedlm.models.pretrained import PretrainedModel
from fedlm.randomness import round_key
from fedlm.trainable.added_biases import add_biases
from fedlm.trainable.build import build_trainable
from fedlm.trainable.parts import dense
from fedlm.training.grouped.trainer import GroupTrainer
from fedlm.training.local import LocalTrainer


def config(*overrides: str) -> Config:
    small = ["vocabulary.size=60", "pretrain.negatives=20", "loss.negatives=20", "data.sequence_length=12",
             "trainable.lora.rank=0", "trainable.embedding_rows.count=0", "local.batch_size=3"]  # fmt: skip
    return load_config(None, [*small, *overrides])


def saved_numbers(run: Callable[[], Any]) -> int:
    """Distinct numbers that autograd keeps from the forward for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def test_no_more_is_kept_for_the_backward_pass_than_without_privacy() -> None:
    model, batch = transformer(), text(4, 12)

    def plain() -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        own_loss(model, batch).sum().backward()  # type: ignore[no-untyped-call]

    engine = PerExampleEngine(task_of(model, own_loss, CHOICES["bias"]))
    assert saved_numbers(lambda: engine.clipped(batch, ClipRule("flat", 1.0))) <= saved_numbers(plain)
    everything = PerExampleEngine(task_of(model, own_loss))
    assert saved_numbers(plain) < saved_numbers(lambda: everything.clipped(batch, ClipRule("flat", 1.0)))


def small_llama() -> PretrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)  # transformers knows no other way
    return PretrainedModel(
        LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     num_key_value_heads=1, intermediate_size=24))
    )  # fmt: skip


def test_added_biases_change_nothing_at_first_and_are_added_once() -> None:
    model = llama()
    tokens = text(2, 9)["tokens"]
    before = model(input_ids=tokens).last_hidden_state
    added = add_biases(model)
    assert torch.equal(model(input_ids=tokens).last_hidden_state, before)
    assert len(added) == 2 * 7
    assert set(added) <= dict(model.named_parameters()).keys()
    assert add_biases(model) == []


def test_factors_of_adapters_get_no_bias() -> None:
    import peft

    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model)
    assert add_biases(randomise(model)) == ["0.base_layer.bias", "1.bias"]


@pytest.mark.parametrize("also", [[], ["trainable.lora.rank=4"]])
def test_added_biases_are_a_federated_update_vector(also: list[str]) -> None:
    """One device alone and a group of devices train the same biases of a model that had none."""
    c = config("trainable.bias=true", "trainable.added_biases=true", *also)
    trainable = build_trainable(small_llama(), c)
    blocks = trainable.initial_blocks(copy_tables=False)
    names = [block.name for block in trainable.spec.blocks if block.kind == "bias"]
    assert len(names) == 2 * 7
    assert not any(np.any(blocks[name]) for name in names)
    text = [np.random.default_rng(d).integers(3, 60, 40).astype(np.int32) for d in range(2)]
    frequencies = np.full(60, 1 / 60)
    alone, together = (kind(trainable, c, frequencies) for kind in (LocalTrainer, GroupTrainer))
    for trainer in (alone, together):
        trainer.start_round(trainable.spec, blocks)
    key = round_key(1, 1)
    grouped = together.train(text, key=key, devices=range(2))
    for d in range(2):
        update = alone.train(text[d], key=key, device=d).update
        assert all(np.any(view) for name, view in trainable.spec.views(update).items() if name in names)
        np.testing.assert_allclose(dense(grouped[d].parts, trainable.spec.size), update, rtol=1e-4, atol=1e-6)


def test_no_bias_to_train_names_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"no bias; set trainable\.added_biases = true"):
        build_trainable(small_llama(), config("trainable.bias=true"))
