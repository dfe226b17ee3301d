"""Two engines that share no gradient code agree, and Opacus leaves no trace on the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from brute_force import Inputs, task_of
from test_per_example_engine import CHOICES, bert, over_real_tokens, own_loss, text, transformer, with_lora
from torch import Tensor, nn

from fedlm.errors import ConfigError
from fedlm.example_dp.clip_rule import ClipRule
from fedlm.example_dp.engine import PerExampleEngine
from fedlm.example_dp.opacus_engine import OpacusEngine

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[str], bool]]] = {
    "full": (transformer, CHOICES["full"]),
    "bias": (transformer, CHOICES["bias"]),
    "lora": (lambda: with_lora(transformer(), ["qkv", "up"]), lambda name: "lora_" in name),
}


def bert_loss(model: Any, batch: Inputs) -> Tensor:
    B, T = batch["tokens"].shape
    output = model(
        input_ids=batch["tokens"], attention_mask=batch["mask"].long(), position_ids=torch.arange(T).expand(B, T)
    )
    return over_real_tokens(output.last_hidden_state, batch)


def assert_equal_engines(task: Any, batch: Inputs) -> None:
    rule = ClipRule("flat", 0.5)
    ours, theirs = PerExampleEngine(task).clipped(batch, rule), OpacusEngine(task).clipped(batch, rule)
    torch.testing.assert_close(ours.norms, theirs.norms, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-12, atol=1e-14)
    assert ours.sums.keys() == theirs.sums.keys()
    assert (ours.num_clipped, ours.num_rejected) == (theirs.num_clipped, theirs.num_rejected)
    for name, total in theirs.sums.items():
        torch.testing.assert_close(ours.sums[name], total, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_the_engines_agree_on_our_transformer(case: str) -> None:
    make, chosen = CASES[case]
    assert_equal_engines(task_of(make(), own_loss, chosen), text(4, 12))


def test_the_engines_agree_on_bert() -> None:
    assert_equal_engines(task_of(bert(), bert_loss, lambda name: "pooler" not in name), text(3, 8))


def test_opacus_leaves_no_trace() -> None:
    model = transformer()
    kept = dict(model.named_parameters())["norm.weight"]
    kept.grad, kept.requires_grad = torch.ones_like(kept), False
    OpacusEngine(task_of(model, own_loss)).clipped(text(3, 12), ClipRule("flat", 1.0))
    assert not kept.requires_grad
    assert torch.equal(kept.grad, torch.ones_like(kept))
    for name, parameter in model.named_parameters():
        assert getattr(parameter, "grad_sample", None) is None
        assert name == "norm.weight" or (parameter.grad is None and parameter.requires_grad)
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_position_ids_shared_by_all_examples_are_refused_by_name() -> None:
    def loss(model: Any, batch: Inputs) -> Tensor:
        return over_real_tokens(model(input_ids=batch["tokens"]).last_hidden_state, batch)

    with pytest.raises(ConfigError, match=r"position_embeddings\.weight"):
        OpacusEngine(task_of(bert(), loss)).clipped(text(3, 8), ClipRule("flat", 1.0))


def test_tables_are_refused_by_name() -> None:
    task = task_of(nn.Linear(2, 2), lambda m, batch: m(batch["x"]).sum(1))
    task.trained = {**task.trained, "input_table": torch.zeros(3, 2)}
    with pytest.raises(ConfigError, match="Opacus cannot train 'input_table'"):
        OpacusEngine(task)
