"""Norms and clipped sums of whole models equal those of one example at a time."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from brute_force import Inputs, SimpleTask, assert_exact, one_by_one, task_of
from torch import Tensor, nn

from fedlm.errors import ConfigError
from fedlm.example_dp.clip_rule import ClipRule
from fedlm.example_dp.engine import PerExampleEngine
from fedlm.models.lstm import LstmModel
from fedlm.models.transformer import TransformerModel
from fedlm.trainable.added_biases import add_biases

V, D = 23, 8
RULE = ClipRule("flat", 0.1)
CHOICES = {
    "full": lambda name: True,
    "bias": lambda name: name.endswith("bias"),
    "weight": lambda name: name.endswith("weight"),
}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.double()
    return model.eval()


def text(B: int, T: int, seed: int = 0) -> Inputs:
    """Tokens with repetitions, and a mask with padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B, 1), generator=generator)
    return {
        "tokens": torch.randint(1, V, (B, T), generator=generator),
        "mask": torch.arange(T).expand(B, T) < lengths,
    }


def over_real_tokens(hidden: Tensor, batch: Inputs) -> Tensor:
    """A loss with a gradient at every real position, (B,)."""
    mask = batch["mask"].unsqueeze(-1)  # (B, T, 1)
    return (hidden.cos() * mask).sum((1, 2)) / mask.sum((1, 2))


def own_loss(model: nn.Module, batch: Inputs) -> Tensor:
    table = torch.arange(V * D, dtype=torch.float64).sin().view(V, D)
    assert isinstance(model, TransformerModel | LstmModel)
    return over_real_tokens(model.body(F.embedding(batch["tokens"], table), batch["mask"]), batch)


def hugging_face_loss(model: Any, batch: Inputs) -> Tensor:
    output = model(input_ids=batch["tokens"], attention_mask=batch["mask"].long())
    return over_real_tokens(output.last_hidden_state, batch)


def transformer(T: int = 12) -> nn.Module:
    return randomise(TransformerModel(V, T, d_model=D, num_layers=2, num_heads=2, d_ff=20))


def lstm() -> nn.Module:
    return randomise(LstmModel(V, d_model=D, d_hidden=6, num_layers=2))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    return randomise(GPT2Model(GPT2Config(vocab_size=V, n_embd=D, n_layer=2, n_head=2, n_positions=16,
                                          bos_token_id=0, eos_token_id=0)))  # fmt: skip


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return randomise(LlamaModel(LlamaConfig(vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=2,
                                            num_key_value_heads=1, intermediate_size=12)))  # fmt: skip


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return randomise(BertModel(BertConfig(vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=2,
                                          intermediate_size=12, max_position_embeddings=16)))  # fmt: skip


def with_lora(model: nn.Module, targets: list[str]) -> nn.Module:
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets), model)
    return randomise(model)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("make", [transformer, lstm])
def test_own_models(make: Any, choice: str) -> None:
    assert_exact(task_of(make(), own_loss, CHOICES[choice]), text(5, 12))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("make", [gpt2, llama])
def test_hugging_face_decoders(make: Any, choice: str) -> None:
    model = make()
    if make is llama:
        add_biases(model)
        randomise(model)
    assert_exact(task_of(model, hugging_face_loss, CHOICES[choice]), text(3, 9))


@pytest.mark.parametrize("choice", CHOICES)
def test_bert_with_token_types_and_pooler(choice: str) -> None:
    def loss(model: Any, batch: Inputs) -> Tensor:
        output = model(
            input_ids=batch["tokens"], attention_mask=batch["mask"].long(), token_type_ids=batch["tokens"] % 2
        )
        return over_real_tokens(output.last_hidden_state, batch) + output.pooler_output.square().sum(1)

    assert_exact(task_of(bert(), loss, CHOICES[choice]), text(4, 11))


@pytest.mark.parametrize(("make", "targets"), [(transformer, ["qkv", "down"]), (llama, ["q_proj", "down_proj"])])
@pytest.mark.parametrize("also", ["", "bias"])
def test_lora(make: Any, targets: list[str], also: str) -> None:
    model = with_lora(make(), targets)
    loss = own_loss if make is transformer else hugging_face_loss
    task = task_of(model, loss, lambda name: "lora_" in name or (bool(also) and name.endswith(also)))
    assert_exact(task, text(4, 10))


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    B, T = (int(torch.randint(1, high, (), generator=generator)) for high in (7, 40))
    heads, width, layers = (int(torch.randint(1, high, (), generator=generator)) for high in (4, 5, 3))
    D = 2 * heads * width
    model = randomise(TransformerModel(V, 40, d_model=D, num_layers=layers, num_heads=heads, d_ff=3 * D), seed)

    def loss(model: nn.Module, batch: Inputs) -> Tensor:
        table = torch.arange(V * D, dtype=torch.float64).sin().view(V, D)
        assert isinstance(model, TransformerModel)
        return over_real_tokens(model.body(F.embedding(batch["tokens"], table)), batch)

    assert_exact(task_of(model, loss, list(CHOICES.values())[seed % 3]), text(B, T, seed))


@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 7), (3, 1), (2, 30)])
def test_edge_shapes_with_a_trained_embedding(B: int, T: int) -> None:
    model = randomise(nn.Sequential(nn.Embedding(V, D, padding_idx=0), nn.LayerNorm(D), nn.Linear(D, 3)))
    tokens = text(B, T)["tokens"]
    tokens[:, T // 2 :] = 0
    assert_exact(task_of(model, lambda m, batch: m(batch["tokens"]).cos().sum((1, 2))), {"tokens": tokens})


def test_nothing_of_the_model_is_touched() -> None:
    model = transformer()
    names = dict(model.named_parameters())
    for name, parameter in names.items():
        parameter.requires_grad_("norm" not in name)
    names["norm.weight"].grad = torch.ones(D, dtype=torch.float64)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in names.items()}
    task = task_of(model, own_loss)
    engine = PerExampleEngine(task)
    engine.clipped(text(3, 12), RULE)
    with pytest.raises(IndexError):
        engine.clipped({"tokens": torch.full((2, 4), V + 9), "mask": torch.ones(2, 4, dtype=torch.bool)}, RULE)
    for name, parameter in names.items():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert (parameter.grad is None) == (name != "norm.weight")
    assert all(not module._forward_hooks and "forward" not in vars(module) for module in model.modules())
    assert torch.equal(names["norm.weight"].grad, torch.ones(D))  # type: ignore[arg-type]


def test_parameters_outside_the_task_get_no_gradient() -> None:
    model = transformer()
    PerExampleEngine(task_of(model, own_loss, CHOICES["bias"])).clipped(text(3, 12), RULE)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_what_is_not_called_gets_zeros() -> None:
    model = randomise(nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2), "lost": nn.Linear(2, 2)}))

    def loss(model: Any, batch: Inputs) -> Tensor:
        model["lost"](batch["x"])
        return model["used"](batch["x"]).sum(1)

    found = assert_exact(task_of(model, loss), {"x": torch.ones(3, 2, dtype=torch.float64)})
    assert not found.sums["unused.weight"].any()
    assert not found.sums["lost.bias"].any()


def test_losses_without_any_trained_module_give_zeros() -> None:
    model = randomise(nn.Linear(2, 2))
    task = task_of(model, lambda _, batch: batch["x"].sum(1))
    found = PerExampleEngine(task).clipped({"x": torch.ones(3, 2, dtype=torch.float64)}, RULE)
    assert not found.norms.any()
    assert found.losses.tolist() == [2, 2, 2]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_an_example_that_is_not_finite_adds_nothing_and_spoils_nobody(bad: float, choice: str) -> None:
    parts = {"rows": nn.Embedding(V, D), "norm": nn.LayerNorm(D), "up": nn.Linear(D, 40), "down": nn.Linear(40, 2)}
    model = randomise(nn.ModuleDict(parts))

    def loss(model: Any, batch: Inputs) -> Tensor:
        x = model["norm"](model["rows"](batch["tokens"]) * batch["scale"])
        return (model["down"](model["up"](x).tanh()) * batch["scale"]).sum((1, 2))

    batch = text(4, 3) | {"scale": torch.ones(4, 1, 1, dtype=torch.float64)}
    others = {name: tensor[[0, 1, 3]] for name, tensor in batch.items()}
    batch["scale"][2] = bad
    engine = PerExampleEngine(task_of(model, loss, CHOICES[choice]))
    found, wanted = engine.clipped(batch, RULE), engine.clipped(others, RULE)
    assert found.num_rejected == 1
    for name, total in wanted.sums.items():
        torch.testing.assert_close(found.sums[name], total, rtol=1e-12, atol=1e-14)


def test_the_clipped_contribution_of_one_example_is_within_the_bound_in_float32() -> None:
    model = transformer().float()

    def loss(model: nn.Module, batch: Inputs) -> Tensor:
        table = torch.arange(V * D).sin().view(V, D)
        assert isinstance(model, TransformerModel)
        return 1e3 * over_real_tokens(model.body(F.embedding(batch["tokens"], table)), batch)

    task = task_of(model, loss)
    batch = text(6, 12)
    for i in range(6):
        alone = {name: tensor[i : i + 1] for name, tensor in batch.items()}
        found = PerExampleEngine(task).clipped(alone, RULE)
        total = torch.cat([part.flatten() for part in found.sums.values()]).double().norm()
        assert 0.995 * RULE.clip_norm < total <= RULE.clip_norm


def test_inplace_change_of_an_output_is_followed_and_of_an_input_refused() -> None:
    def relu(model: Any, batch: Inputs) -> Tensor:
        return model[1](F.relu_(model[0](batch["x"]))).sum(1)

    def overwritten(model: Any, batch: Inputs) -> Tensor:
        x = batch["x"] * 1
        y = model[0](x)
        x += 1
        return model[1](y).sum(1)

    model = randomise(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    batch = {"x": torch.arange(12, dtype=torch.float64).cos().view(3, 4)}
    assert_exact(task_of(model, relu), batch)
    with pytest.raises(RuntimeError, match="inplace"):
        PerExampleEngine(task_of(model, overwritten)).clipped(batch, RULE)


def test_checkpointed_blocks_are_exact() -> None:
    from torch.utils.checkpoint import checkpoint

    def loss(model: Any, batch: Inputs) -> Tensor:
        x = checkpoint(model[0], batch["x"], use_reentrant=False).tanh()
        return checkpoint(model[1], x, use_reentrant=False).sum(1)

    model = randomise(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    assert_exact(task_of(model, loss), {"x": torch.arange(12, dtype=torch.float64).cos().view(3, 4)})


def test_a_loss_for_the_whole_batch_is_refused() -> None:
    task = SimpleTask(nn.Linear(2, 1), lambda m, batch: m(batch["x"]).mean())
    with pytest.raises(ConfigError, match=r"losses have shape \(\) for 3 examples"):
        PerExampleEngine(task).clipped({"x": torch.ones(3, 2)}, RULE)


def test_brute_force_is_itself_right() -> None:
    """The reference on a case that is plain arithmetic."""
    model = nn.Linear(2, 1, bias=False)
    task = task_of(model, lambda m, batch: m(batch["x"]).sum(1))
    gradients = one_by_one(task, {"x": torch.tensor([[3.0, 4.0], [1.0, 0.0]])})
    assert [one["weight"].tolist() for one in gradients] == [[[3, 4]], [[1, 0]]]
