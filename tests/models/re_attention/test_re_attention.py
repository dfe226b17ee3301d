"""Re-Attention: exact gradients, the bias it removes, and propagated variances against those of noised models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_models import VOCABULARY, ModelMaker, small_model

from fedlm.config import load_config
from fedlm.config.schema import LoraConfig
from fedlm.errors import ConfigError, DataError
from fedlm.models.attention import attention_variance, causal_attention
from fedlm.models.re_attention.attention import Noised, NoiseFlow
from fedlm.models.re_attention.noise_levels import NoiseLevels
from fedlm.models.transformer import TransformerModel
from fedlm.trainable.adapters import inject_adapter


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal float64."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def corrected_by_hand(qkv: torch.Tensor, num_heads: int, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (B, T, D) and its weights (B, H, T, T), the correction as a whole matrix, by autograd."""
    B, T, width = qkv.shape
    q, k, v = (part.view(B, T, num_heads, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
    W = q.shape[-1]
    bias = q.norm(dim=-1)[..., None] ** 2 * noise.transpose(1, 2)[:, :, None] / (2 * W)
    logits = q @ k.transpose(-1, -2) / math.sqrt(W) - bias
    weights = logits.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(B, T, width // 3), weights


@pytest.mark.parametrize("length", [1, 7, 64, 65, 130])
def test_values_and_gradients_equal_a_whole_matrix_of_corrections(length: int) -> None:
    qkv = (2 * draw(1, 2, length, 3 * 12)).requires_grad_()
    noise = draw(2, 2, length, 3).exp()
    found, wanted = causal_attention(qkv, 3, noise), corrected_by_hand(qkv, 3, noise)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    weights = draw(3, *found.shape)
    gradients = [torch.autograd.grad((weights * output).sum(), qkv)[0] for output in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [5, 66])
def test_the_gradient_is_that_of_finite_differences(length: int) -> None:
    qkv = draw(1, 1, length, 3 * 4).requires_grad_()
    noise = draw(2, 1, length, 2).exp()
    assert torch.autograd.gradcheck(lambda x: causal_attention(x, 2, noise), qkv, fast_mode=True)


@pytest.mark.parametrize("length", [16, 80])
def test_equal_noise_on_all_keys_changes_nothing(length: int) -> None:
    qkv = draw(4, 2, length, 24)
    noised = causal_attention(qkv, 2, torch.full((2, length, 2), 3.0, dtype=torch.float64))
    torch.testing.assert_close(noised, causal_attention(qkv, 2))


@pytest.mark.parametrize("length", [3, 64, 150])
def test_attention_variance_is_the_sum_of_squared_weights(length: int) -> None:
    qkv, values = draw(5, 2, length, 24), draw(6, 2, length, 8).square()
    noise = draw(7, 2, length, 2).exp()
    squares = corrected_by_hand(qkv, 2, noise)[1].square()  # (B, H, T, T)
    wanted = (squares @ values.view(2, length, 2, 4).transpose(1, 2)).transpose(1, 2).reshape(2, length, 8)
    torch.testing.assert_close(attention_variance(qkv, values, 2, noise), wanted)


def share_of_bias_removed(length: int, query_scale: float, seed: int, num_draws: int) -> float:
    """Compare expected attention weights of noisy keys with those of exact ones; identity values show the weights."""
    q, k = query_scale * draw(10 + seed, length, length), draw(20 + seed, length, length)
    source = torch.Generator().manual_seed(seed)
    std = torch.linspace(0.05, 0.8, length, dtype=torch.float64)[torch.randperm(length, generator=source)]
    eye = torch.eye(length, dtype=torch.float64)
    mean, mean_corrected = torch.zeros(2, length, length, dtype=torch.float64)
    for _ in range(num_draws // 50):
        keys = k + std[:, None] * torch.randn(50, length, length, generator=source, dtype=torch.float64)
        noisy = torch.cat([q.expand_as(keys), keys, eye.expand_as(keys)], -1)  # (N, T, 3 T)
        mean += causal_attention(noisy, 1).sum(0) / num_draws
        mean_corrected += causal_attention(noisy, 1, std.square()[None, :, None].expand(50, -1, -1)).sum(0) / num_draws
    exact = causal_attention(torch.cat([q, k, eye], -1)[None], 1)[0]
    rows = slice(length // 2, None)  # queries that see enough keys for a bias to be worth the name
    return 1 - float((mean_corrected - exact)[rows].abs().sum() / (mean - exact)[rows].abs().sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length", [64, 96])
def test_it_removes_three_quarters_of_the_bias_at_random_keys(length: int, seed: int) -> None:
    assert share_of_bias_removed(length, 1.0, seed, 2_000 if length == 64 else 1_000) > 0.75


@pytest.mark.parametrize("seed", range(2))
def test_sharper_attention_keeps_more_of_the_bias_but_never_gains_any(seed: int) -> None:
    """Where one key holds most of the weight, a softmax of expectations is a worse stand-in (docs/re_attention.md)."""
    assert 0.4 < share_of_bias_removed(64, 1.5, seed, 2_000) < 0.9


def test_linear_variance_is_exact_with_noise_in_inputs_weights_and_adapters() -> None:
    model = small_model("transformer")
    inject_adapter(model, LoraConfig(rank=2, targets=("up",)))
    module = model.get_submodule("blocks.0.mlp.up").double()
    values = {
        name: torch.nn.init.normal_(p.data, std=0.5, generator=torch.Generator().manual_seed(i)).clone()
        for i, (name, p) in enumerate(module.named_parameters())
    }
    levels = {name: 0.02 * (i + 1) for i, name in enumerate(values)}
    assert len(levels) == 4
    flow = NoiseFlow({id(p): levels[name] for name, p in module.named_parameters()})
    x, v = draw(1, 1, 1, 16), 0.1 * draw(2, 1, 1, 16).square()
    predicted = flow.linear(module, Noised(x, v)).variance[0, 0]  # (out,)
    source, outputs = torch.Generator().manual_seed(9), []
    with torch.no_grad():
        for _ in range(4_000):
            for name, p in module.named_parameters():
                p.copy_(values[name] + levels[name] ** 0.5 * torch.randn(p.shape, generator=source))
            outputs.append(module(x + v.sqrt() * torch.randn(x.shape, generator=source))[0, 0])
    ratios = torch.stack(outputs).var(0) / predicted
    assert ratios.mean().item() == pytest.approx(1, abs=0.03)
    assert ((ratios - 1).abs() < 0.25).all()  # a heavy-tailed product of Gaussians


def streams(model: TransformerModel, x: torch.Tensor) -> list[torch.Tensor]:
    """The residual stream (T, D) after each block, and the final norm's output."""
    x = model.positions(x)
    found = []
    for block in model.blocks:
        x = block(x)
        found.append(x[0])
    return [*found, model.norm(x)[0]]


@pytest.mark.parametrize("what", ["rows", "weights", "both"])
def test_propagated_variances_are_within_a_factor_of_two_and_a_half_of_those_of_noised_models(what: str) -> None:
    model = small_model("transformer", d_model=32, seed=1).double()
    assert isinstance(model, TransformerModel)
    parameters = dict(model.named_parameters())
    for i, p in enumerate(parameters.values()):  # large enough that attention and GELU are far from linear
        p.data += 0.2 * draw(i, *p.shape)
    values = {name: p.detach().clone() for name, p in parameters.items()}
    x = draw(50, 1, 12, 32)
    rows = torch.linspace(0.01, 0.1, 12, dtype=torch.float64) * (what != "weights")  # (T,)
    weight = 2e-4 * (what != "rows")
    flow = NoiseFlow({id(p): weight for p in parameters.values()})
    stream = Noised(model.positions(x), (rows[:, None] + weight).expand(12, 32)[None])
    predicted = []
    with torch.no_grad():
        for block in model.blocks:
            stream = block.noised(stream, flow)
            predicted.append(stream.variance[0])
        predicted.append(flow.layer_norm(model.norm, stream).variance[0])
        source, draws = torch.Generator().manual_seed(3), []
        for _ in range(600):
            for name, p in parameters.items():
                p.copy_(values[name] + weight**0.5 * torch.randn(p.shape, generator=source))
            draws.append(streams(model, x + rows.sqrt()[:, None] * torch.randn(x.shape, generator=source)))
    for layer, variance in enumerate(predicted):
        found = torch.stack([one[layer] for one in draws]).var(0)  # (T, D)
        ratios = variance.mean(-1) / found.mean(-1)  # (T,)
        assert ratios.min() > 0.4, ratios  # too low where attention is sharp: the noise of its weights is left out
        assert ratios.max() < 1.8, ratios
        if what == "rows":  # the order of tokens is what the correction lives on
            assert np.corrcoef(variance.mean(-1), found.mean(-1))[0, 1] > 0.9


def levels_of(model: TransformerModel, row: float = 0.01, weight: float = 1e-4) -> NoiseLevels:
    rows = (row * np.arange(VOCABULARY) / VOCABULARY).astype(np.float32)
    return NoiseLevels(rows, {name: weight for name, _ in model.named_parameters()})


def test_without_levels_the_option_changes_no_bit_and_zero_levels_nothing() -> None:
    tokens = torch.arange(2 * 70).view(2, 70) % VOCABULARY
    plain, model = small_model("transformer"), small_model("transformer", re_attention=True)
    assert isinstance(model, TransformerModel)
    for each in (plain, model):
        for name, p in each.named_parameters():
            p.data *= 20 if "qkv.weight" in name else 1  # queries of trained models are no longer near zero
    wanted = plain.hidden(tokens)
    assert torch.equal(model.hidden(tokens), wanted)
    model.noise_levels = levels_of(model, 0.0, 0.0)
    torch.testing.assert_close(model.hidden(tokens), wanted, rtol=1e-4, atol=1e-5)
    model.noise_levels = levels_of(model)
    assert not torch.allclose(model.hidden(tokens), wanted, atol=1e-4)
    model.noise_levels = None
    assert torch.equal(model.hidden(tokens), wanted)


@pytest.mark.parametrize("length", [20, 70])
def test_an_example_is_unmoved_by_its_neighbours_and_its_padding(length: int) -> None:
    model = small_model("transformer", re_attention=True)
    assert isinstance(model, TransformerModel)
    model.noise_levels = levels_of(model)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, VOCABULARY, (3, length)))
    together = model.hidden(tokens)
    alone = model.hidden(tokens[1:2, : length - 5])
    torch.testing.assert_close(together[1, : length - 5], alone[0], rtol=1e-4, atol=1e-5)


def test_the_gradient_treats_variances_as_constants() -> None:
    model = small_model("transformer", re_attention=True).double()
    assert isinstance(model, TransformerModel)
    model.noise_levels = levels_of(model)
    tokens = torch.arange(9)[None]
    model.hidden(tokens).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.noise_levels.rows.dtype == np.float32


def test_misuse_is_refused(make_model: ModelMaker) -> None:
    model = make_model("transformer", re_attention=True)
    assert isinstance(model, TransformerModel)
    plain = make_model("transformer")
    assert isinstance(plain, TransformerModel)
    with pytest.raises(DataError, match=r"set model\.re_attention"):
        plain.noise_levels = levels_of(model)
    with pytest.raises(DataError, match=f"3 rows; the model has {VOCABULARY}"):
        model.noise_levels = NoiseLevels(np.zeros(3, np.float32), {})
    with pytest.raises(DataError, match=r"did you mean 'blocks\.0\.mlp\.up\.weight'"):
        model.noise_levels = NoiseLevels(np.zeros(VOCABULARY, np.float32), {"blocks.0.mlp.up.wieght": 1.0})
    model.noise_levels = levels_of(model)
    with pytest.raises(DataError, match=r"row_noise\(tokens\)"):
        model.body(torch.zeros(1, 3, 16))
    assert make_model("lstm").row_noise(torch.zeros(1, 3, dtype=torch.int64)) is None


@pytest.mark.parametrize("name", ["lstm", "some/folder"])
def test_the_option_is_of_our_transformer_alone(name: str) -> None:
    source = "wordfreq" if name == "lstm" else "model"
    with pytest.raises(ConfigError, match=r"model\.re_attention = 'off'"):
        load_config(None, ["model.re_attention=absolute", f"model.name={name}", f"vocabulary.source={source}"])
