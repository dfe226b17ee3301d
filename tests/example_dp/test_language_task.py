"""Whole language models through the engine, against one example at a time and against Opacus hooks, float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding

from fedlm.config.schema import Config, DataConfig, LossConfig, ModelConfig
from fedlm.data.batching import Batch, sequences
from fedlm.errors import ConfigError
from fedlm.example_dp.clip_rule import ClipRule
from fedlm.example_dp.engine import PerExampleEngine
from fedlm.example_dp.language import LanguageTask, Sequences
from fedlm.example_dp.per_example_gradients import PerExampleGradients
from fedlm.losses.nce import nce_loss
from fedlm.losses.negatives import NoiseDistribution
from fedlm.losses.sampled_softmax import sampled_softmax_loss
from fedlm.models.base import LanguageModel
from fedlm.models.factory import build_model
from fedlm.models.pretrained import PretrainedModel
from fedlm.randomness import seed_key, stream
from fedlm.trainable.build import Trainable
from fedlm.trainable.spec import UpdateSpec

V, LENGTH, D = 41, 12, 8
FREQUENCIES = np.random.default_rng(0).dirichlet(np.ones(V))
KEY = seed_key(5)
NO_BOUND = ClipRule(kind="flat", clip_norm=1e9)
CONFIG = Config(
    data=DataConfig(sequence_length=LENGTH),
    model=ModelConfig(d_model=D, num_layers=1, num_heads=2, d_hidden=6),
    loss=LossConfig(kind="full_softmax", negatives=9, chunk=16),
)


def own_model(name: str, *, tied: bool = True) -> LanguageModel:
    config = replace(CONFIG, model=replace(CONFIG.model, name=name, tied=tied))
    model = build_model(config, FREQUENCIES, 3).double()
    for parameter in model.parameters():  # initial weights are too small to show a wrong term
        parameter.data.mul_(5)
    # Not so large that a score passes 20, where torch's softplus, which the reference uses, becomes linear.
    model.set_tables(input_table=model.input_table * (4 if name == "lstm" else 12))
    return model


def hugging_face(*, tied: bool = True) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)  # transformers knows no other way
    config = GPT2Config(vocab_size=V, n_embd=D, n_layer=1, n_head=2, n_positions=LENGTH, tie_word_embeddings=tied,
                        initializer_range=0.3, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()  # type: ignore[no-any-return]


def make_model(kind: str) -> LanguageModel:
    name, _, untied = kind.partition(" ")
    if name == "gpt2":
        return PretrainedModel(hugging_face(tied=not untied)).eval()
    return own_model(name, tied=not untied)


def make_task(model: LanguageModel, loss: str, tables: frozenset[str] | None = None) -> LanguageTask:
    """Return a task that trains the whole body and, by default, every table."""
    if tables is None:
        has = {"input_table": True, "output_table": not model.tied, "output_bias": model.output_bias is not None}
        tables = frozenset(name for name, present in has.items() if present)
    parameters = {name: parameter.requires_grad_() for name, parameter in model.named_parameters()}
    trainable = Trainable(
        model, parameters, UpdateSpec.build([(n, "dense", tuple(p.shape)) for n, p in parameters.items()])
    )
    config = replace(CONFIG, loss=replace(CONFIG.loss, kind=loss))
    return LanguageTask(trainable, config, FREQUENCIES, tables=tables, negatives_key=KEY)


def private_sequences(num_examples: int, seed: int = 0) -> Sequences:
    """Sequences of different lengths with repeated tokens and prompts; the last one is the shortest."""
    rng = np.random.default_rng(seed)
    whole = sequences(rng.integers(V // 2, size=num_examples * LENGTH + 1), LENGTH)
    lengths = np.sort(rng.integers(1, LENGTH + 1, size=(num_examples, 1)), axis=0)[::-1]
    present = np.arange(LENGTH) < lengths
    mask = present & (np.arange(LENGTH) >= lengths // 3)
    return Sequences(Batch(whole.inputs * present, whole.targets * mask, mask, present))


def one_example(
    task: LanguageTask, batch: Batch, i: int, loss: str, negatives: Tensor, log_expected: Tensor
) -> dict[str, Tensor]:
    """Return an example's gradient of everything that trains, through the dense logits."""
    model = task.model
    n = int(batch.read[i].sum())
    inputs, targets, mask = (torch.from_numpy(a[i, :n]) for a in (batch.inputs, batch.targets, batch.mask))
    targets = targets[mask]
    leaves = {
        name: t if isinstance(t, nn.Parameter) else t.clone().requires_grad_() for name, t in task.trained.items()
    }
    table = leaves["input_table"]
    output, bias = (table if model.tied else leaves["output_table"]), leaves.get("output_bias")
    hidden = model.body(model.embed(embedding(inputs, table))[None])[0][mask]
    if loss == "full_softmax":
        logits = hidden @ output.T if bias is None else hidden @ output.T + bias
        value = cross_entropy(logits, targets)
    else:
        sampled = nce_loss if loss == "nce" else sampled_softmax_loss
        value = sampled(hidden, targets, negatives, output, bias, log_expected)
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(leaves, gradients, strict=True)}


def norm(gradient: dict[str, Tensor]) -> Tensor:
    return torch.stack([g.norm() for g in gradient.values()]).norm()


@pytest.mark.parametrize("loss", ["full_softmax", "nce", "sampled_softmax"])
@pytest.mark.parametrize("kind", ["transformer", "transformer untied", "lstm", "gpt2", "gpt2 untied"])
def test_all_weights_match_one_example_at_a_time(kind: str, loss: str) -> None:
    task = make_task(make_model(kind), loss)
    batch = private_sequences(4).batch(np.arange(4))
    noise = NoiseDistribution(FREQUENCIES, CONFIG.loss, np.arange(V))
    negatives = torch.from_numpy(noise.draw(stream(KEY, "negatives", 0)))
    log_expected = torch.from_numpy(noise.log_expected).double()
    found = PerExampleEngine(task).clipped(batch, NO_BOUND)
    gradients = [one_example(task, batch, i, loss, negatives, log_expected) for i in range(4)]
    wanted = torch.stack([norm(g) for g in gradients]).detach()
    torch.testing.assert_close(found.norms, wanted, rtol=1e-12, atol=1e-12)
    assert found.sums.keys() == task.trained.keys()
    for name, total in found.sums.items():
        each = sum((g[name] for g in gradients), torch.zeros(()))
        torch.testing.assert_close(total, each, rtol=1e-11, atol=1e-12 * float(wanted.max()))
    rule = ClipRule(kind="flat", clip_norm=float(wanted.median()))
    factors = rule.factors(wanted)
    for name, total in PerExampleEngine(task).clipped(batch, rule).sums.items():
        each = sum((f * g[name] for f, g in zip(factors, gradients, strict=True)), torch.zeros(()))
        torch.testing.assert_close(total, each, rtol=1e-11, atol=1e-12 * float(wanted.max()))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the first module's inputs are token ids
def test_tied_gpt2_matches_opacus_hooks() -> None:
    grad_sample = pytest.importorskip("opacus.grad_sample")
    batch = private_sequences(3).batch(np.arange(3))
    reference = grad_sample.GradSampleModule(hugging_face().train(), strict=False, loss_reduction="sum")
    arrays = batch.inputs, batch.targets, batch.mask, batch.read
    inputs, targets, mask, read = (torch.from_numpy(array) for array in arrays)
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)  # of shape (1, T) they break the hooks
    logits = reference(input_ids=inputs, attention_mask=read, position_ids=positions, use_cache=False).logits
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(mask) * mask
    (losses.sum(1) / mask.sum(1)).sum().backward()
    samples = [p.grad_sample for p in reference.parameters()]
    wanted = torch.stack([s.flatten(1).norm(dim=1) for s in samples]).norm(dim=0)
    table = reference._module.transformer.wte.weight
    task = make_task(PretrainedModel(hugging_face()).eval(), "full_softmax")
    found = PerExampleEngine(task).clipped(batch, NO_BOUND)
    torch.testing.assert_close(found.norms, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.sums["input_table"], table.grad_sample.sum(0), rtol=1e-11, atol=1e-12)


def test_chosen_tables_become_the_models_own_memory() -> None:
    model = own_model("transformer", tied=False)
    before = model.input_table, model.output_table, model.output_bias
    task = make_task(model, "nce", frozenset({"input_table", "output_bias"}))
    assert model.output_table is before[1]
    assert task.trained["input_table"].data_ptr() == model.input_table.data_ptr() != before[0].data_ptr()
    batch = private_sequences(2).batch(np.arange(2))
    first = task.losses(batch, PerExampleGradients(2)).detach()
    task.trained["input_table"].mul_(0.5)  # as an optimiser steps: in place
    assert not torch.equal(task.losses(batch, PerExampleGradients(2)).detach(), first)
    assert not torch.equal(before[0], model.input_table)


def test_negatives_follow_the_step_and_not_the_physical_batch() -> None:
    task = make_task(own_model("transformer"), "nce")
    examples = private_sequences(5)
    losses = lambda *rows: task.losses(examples.batch(np.array(rows)), PerExampleGradients(len(rows))).detach()  # noqa: E731
    task.begin_step(3, bytes(32))
    together = losses(0, 1, 2, 3, 4)
    apart = torch.cat([losses(0, 1), losses(2), losses(3, 4)])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    task.begin_step(4, bytes(32))
    assert not torch.allclose(losses(0, 1, 2, 3, 4), together)


def test_dropout_follows_the_secret() -> None:
    model = build_model(replace(CONFIG, model=replace(CONFIG.model, dropout=0.5)), FREQUENCIES, 3)
    task = make_task(model.train(), "full_softmax")
    batch = private_sequences(2).batch(np.arange(2))

    def losses(secret: bytes) -> Tensor:
        task.begin_step(0, secret)
        return task.losses(batch, PerExampleGradients(2)).detach()

    assert torch.equal(losses(b"a" * 32), losses(b"a" * 32))
    assert not torch.equal(losses(b"a" * 32), losses(b"b" * 32))


def test_a_sequence_without_targets_has_no_loss_and_no_gradient() -> None:
    mask = np.zeros((2, LENGTH), dtype=bool)
    mask[1, :5] = True
    ids = np.random.default_rng(2).integers(V, size=(2, LENGTH)) * mask
    examples = Sequences(Batch(ids, ids, mask))
    engine = PerExampleEngine(make_task(own_model("transformer"), "full_softmax"))
    both, empty = (
        engine.clipped(examples.batch(np.arange(2)), NO_BOUND),
        engine.clipped(examples.batch(np.array([0])), NO_BOUND),
    )
    assert float(both.norms[0]) == float(empty.norms[0]) == float(empty.losses[0]) == 0
    assert float(both.norms[1]) > 0
    assert all(float(total.abs().max()) == 0 for total in empty.sums.values())


def test_sequences_are_cut_to_the_longest_but_never_to_nothing() -> None:
    examples = private_sequences(4)
    shortest = examples.batch(np.array([3]))
    assert shortest.inputs.shape == shortest.mask.shape == (1, int(shortest.read.sum()))
    none = Sequences(Batch(*(np.zeros((3, 4), dtype=t) for t in (np.int64, np.int64, np.bool_))))
    assert len(none) == 3
    assert none.batch(np.array([0, 2])).inputs.shape == (2, 1)


def test_what_cannot_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="'output_table' cannot train"):
        make_task(own_model("transformer"), "nce", frozenset({"output_table"}))
    with pytest.raises(ConfigError, match="'output_bias' cannot train: the model has only input_table"):
        make_task(make_model("gpt2"), "nce", frozenset({"output_bias"}))
    model = own_model("transformer")
    config = replace(CONFIG, loss=LossConfig(kind="nce", negatives_from="rows"))
    with pytest.raises(ConfigError, match="row set"):
        LanguageTask(Trainable(model, {}, UpdateSpec.build([])), config, FREQUENCIES, negatives_key=KEY)
