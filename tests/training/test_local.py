"""One device's training against independent references: peft with torch's SGD, and plain autograd on whole tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from fedlm.config.load import load_config
from fedlm.config.schema import Config
from fedlm.data.batching import local_batches
from fedlm.losses.negatives import NoiseDistribution
from fedlm.models.base import LanguageModel
from fedlm.models.factory import build_model
from fedlm.randomness import round_key, stream
from fedlm.trainable.build import Trainable, build_trainable
from fedlm.trainable.rows import row_set
from fedlm.training.local import LocalResult, LocalTrainer

V, KEY = 60, round_key(1, 1)
FREQUENCIES = 1 / np.arange(3.0, V + 3)
FREQUENCIES /= FREQUENCIES.sum()
TOKENS = np.random.default_rng(0).integers(3, V, 75).astype(np.int32)
BASE = [
    "vocabulary.size=60", "model.d_model=16", "model.num_layers=2", "model.num_heads=2", "pretrain.negatives=20",
    "data.sequence_length=12", "local.batch_size=3", "local.learning_rate=0.5", "local.row_learning_rate=0.5",
    "loss.negatives=20",
]  # fmt: skip


def config(*overrides: str) -> Config:
    return load_config(None, [*BASE, *overrides])


def build(c: Config) -> Trainable:
    trainable = build_trainable(build_model(c, FREQUENCIES, c.seed), c)
    with torch.no_grad():  # adapters start at zero product; give B something so that A gets a gradient too
        generator = torch.Generator().manual_seed(0)
        for name, parameter in trainable.parameters.items():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trainable


def train(c: Config, row_ids: np.ndarray | None = None, device: int = 4) -> tuple[Trainable, LocalResult]:
    trainable = build(c)
    blocks = trainable.initial_blocks(copy_tables=False)
    trainable.bind_tables(blocks)
    trainer = LocalTrainer(trainable, c, FREQUENCIES)
    if row_ids is None:
        row_ids = row_set(c.trainable.embedding_rows, FREQUENCIES, seed=1, round_number=1)
    trainer.start_round(trainable.spec.with_rows(row_ids), blocks)
    return trainable, trainer.train(TOKENS, key=KEY, device=device)


def dense_loss(
    c: Config, hidden: Tensor, targets: Tensor, negatives: np.ndarray, table: Tensor, bias: Tensor
) -> Tensor:
    """Each loss from the whole (N, V) score matrix."""
    scores = hidden @ table.T + bias  # (N, V)
    if c.loss.kind == "full_softmax":
        return nn.functional.cross_entropy(scores, targets)
    noise = NoiseDistribution(FREQUENCIES, c.loss, np.empty(0, np.int64))
    scores = scores - torch.from_numpy(noise.log_expected)
    positive = scores.gather(1, targets[:, None])[:, 0]
    drawn = scores[:, torch.from_numpy(negatives)]  # (N, K)
    if c.loss.kind == "nce":
        per_token = nn.functional.softplus(-positive) + nn.functional.softplus(drawn).sum(1)
    else:
        drawn = drawn.masked_fill(torch.from_numpy(negatives)[None] == targets[:, None], -torch.inf)
        per_token = torch.logsumexp(torch.cat([positive[:, None], drawn], 1), 1) - positive
    return per_token.mean()


def reference_run(c: Config, model: Any, parameters: list[Tensor], table: Tensor, bias: Tensor, device: int) -> None:
    """Train `parameters` in place with torch.optim.SGD on dense losses over whole tables."""
    optimiser = torch.optim.SGD(parameters, lr=c.local.learning_rate)
    batches = local_batches(
        TOKENS, length=12, batch_size=3, epochs=c.local.epochs, generator=stream(KEY, "shuffle", device)
    )
    noise = NoiseDistribution(FREQUENCIES, c.loss, np.empty(0, np.int64))
    rng = stream(KEY, "negatives", device)
    for batch in batches:
        mask = torch.from_numpy(batch.mask)
        hidden = model.body(nn.functional.embedding(torch.from_numpy(batch.inputs), table), mask)[mask]
        negatives = np.empty(0, np.int64) if c.loss.kind == "full_softmax" else noise.draw(rng)
        loss = dense_loss(c, hidden, torch.from_numpy(batch.targets)[mask], negatives, table, bias)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


@pytest.mark.parametrize("loss", ["nce", "sampled_softmax", "full_softmax"])
@pytest.mark.parametrize("freeze_a", ["false", "true"])
def test_lora_update_equals_pefts_own_training(loss: str, freeze_a: str) -> None:
    """Ours against PeftModel + torch.optim.SGD + dense scores, three steps of two epochs each."""
    c = config(f"loss.kind={loss}", "trainable.embedding_rows.count=0", "trainable.lora.rank=4",
               f"trainable.lora.freeze_a={freeze_a}", "local.epochs=2", "local.learning_rate=0.1")  # fmt: skip
    trainable, result = train(c)
    start = build(c)
    plain = build_model(c, FREQUENCIES, c.seed)
    adapter = peft.LoraConfig(
        r=4,
        lora_alpha=c.trainable.lora.alpha,
        target_modules=plain.named_linear_targets(("attention", "mlp")),
    )
    theirs = peft.get_peft_model(plain, adapter)  # type: ignore[arg-type]
    mine = dict(start.model.named_parameters())
    adapted = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for name, parameter in adapted.items():
            parameter.copy_(mine[name])
    trained = {n: p for n, p in adapted.items() if not (freeze_a == "true" and ".lora_A." in n)}
    before = {n: p.detach().clone() for n, p in trained.items()}
    inner: LanguageModel = theirs.base_model.model  # type: ignore[assignment]
    assert inner.output_bias is not None
    reference_run(c, inner, list(trained.values()), inner.input_table, inner.output_bias, device=4)
    assert set(trained) == set(trainable.parameters)
    for name, view in trainable.spec.with_rows(np.empty(0, np.int64)).views(result.update).items():
        expected = (trained[name] - before[name]).detach().numpy()
        np.testing.assert_allclose(view, expected, rtol=1e-4, atol=3e-7)  # fp32 rounding of values near 1
        assert np.abs(expected).max() > 1e-5


@pytest.mark.parametrize("model", ["transformer", "lstm"])
@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("loss", ["nce", "sampled_softmax", "full_softmax"])
def test_all_kinds_together_equal_autograd_on_whole_tables(model: str, tied: str, loss: str) -> None:
    """Dense body + every row: our compact tables against torch.optim.SGD on nn.Parameters of size V x D."""
    c = config(f"model.name={model}", f"model.tied={tied}", f"loss.kind={loss}", "trainable.dense=['*']",
               "trainable.lora.rank=0", "trainable.embedding_rows.sampler='top_k'",
               "trainable.embedding_rows.count=60")  # fmt: skip
    trainable, result = train(c)
    reference = build_model(c, FREQUENCIES, c.seed)
    table = nn.Parameter(reference.input_table.clone())
    output = table if reference.tied else nn.Parameter(reference.output_table.clone())
    assert reference.output_bias is not None
    bias = nn.Parameter(reference.output_bias.clone())
    tables = {"input_table": table, "output_table": output, "output_bias": bias}
    body = dict(reference.named_parameters())
    before = {n: p.detach().clone() for n, p in {**body, **tables}.items()}
    parameters = [*body.values(), *dict.fromkeys(tables.values())]
    for p in parameters:
        p.requires_grad_(True)
    optimiser = torch.optim.SGD(parameters, lr=c.local.learning_rate)
    noise, rng = NoiseDistribution(FREQUENCIES, c.loss, np.empty(0, np.int64)), stream(KEY, "negatives", 4)
    for batch in local_batches(TOKENS, length=12, batch_size=3, epochs=1, generator=stream(KEY, "shuffle", 4)):
        mask = torch.from_numpy(batch.mask)
        hidden = reference.body(nn.functional.embedding(torch.from_numpy(batch.inputs), table), mask)[mask]
        negatives = np.empty(0, np.int64) if loss == "full_softmax" else noise.draw(rng)
        optimiser.zero_grad()
        dense_loss(c, hidden, torch.from_numpy(batch.targets)[mask], negatives, output, bias).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    for name, view in trainable.spec.with_rows(np.arange(V)).views(result.update).items():
        expected = ({**body, **tables}[name] - before[name]).detach().numpy()
        np.testing.assert_allclose(view, expected, rtol=2e-4, atol=2e-7, err_msg=name)


def test_partial_rows_equal_the_same_rows_of_a_full_table_run() -> None:
    """After one step, the rows of S move exactly as in a run of all rows; rows outside S are not in the update."""
    one_step = ("local.batch_size=64", "trainable.lora.rank=0")
    rows = np.array([0, 5, 6, 17, 33, 59])
    _, full = train(config(*one_step, "trainable.embedding_rows.count=60"), np.arange(V))
    trainable, part = train(config(*one_step, "trainable.embedding_rows.count=6"), rows)
    full_views = trainable.spec.with_rows(np.arange(V)).views(full.update)
    part_views = trainable.spec.with_rows(rows).views(part.update)
    for name, view in part_views.items():
        np.testing.assert_allclose(view, full_views[name][rows], rtol=1e-5, atol=1e-8)
    assert np.abs(part_views["input_table"]).max() > 1e-4
    assert len(part.update) == 6 * 17, "a device sends every row of the set, touched or not"


def test_training_leaves_no_trace_on_the_next_device() -> None:
    """A device's update does not depend on who trained before it in the same process."""
    c = config("trainable.embedding_rows.count=30", "local.epochs=2")
    _, alone = train(c, device=9)
    trainable = build(c)
    before = trainable.initial_values()
    blocks = trainable.initial_blocks(copy_tables=True)
    trainable.bind_tables(blocks)
    trainer = LocalTrainer(trainable, c, FREQUENCIES)
    ids = row_set(c.trainable.embedding_rows, FREQUENCIES, seed=1, round_number=1)
    trainer.start_round(trainable.spec.with_rows(ids), blocks)
    trainer.train(TOKENS[:40], key=KEY, device=1)
    after = trainer.train(TOKENS, key=KEY, device=9)
    assert np.array_equal(alone.update, after.update)
    unchanged = [np.array_equal(blocks[name], old) for name, old in trainable.spec.views(before).items()]
    assert all(unchanged), "training writes to nothing but its own copies"


def test_negatives_from_rows_mask_targets_outside() -> None:
    rows = np.arange(0, V, 2)
    c = config("loss.negatives_from=rows", "trainable.embedding_rows.count=30")
    _, result = train(c, rows)
    targets = TOKENS[1:]
    assert result.num_tokens == np.isin(targets, rows).sum()


@pytest.mark.parametrize("tokens", [np.empty(0, np.int32), np.array([1], np.int32)])
def test_a_device_without_a_target_sends_zeros(tokens: np.ndarray) -> None:
    c = config("trainable.embedding_rows.count=30")
    trainable = build(c)
    blocks = trainable.initial_blocks(copy_tables=False)
    trainable.bind_tables(blocks)
    trainer = LocalTrainer(trainable, c, FREQUENCIES)
    trainer.start_round(trainable.spec.with_rows(np.arange(30)), blocks)
    result = trainer.train(tokens, key=KEY, device=0)
    assert not result.update.any()
    assert result.num_tokens == 0


def test_dropout_is_a_function_of_round_and_device() -> None:
    c = replace(config("trainable.embedding_rows.count=30", "model.dropout=0.3"))
    torch.manual_seed(1)
    first = train(c)[1].update
    torch.manual_seed(2)
    assert np.array_equal(first, train(c)[1].update)
    assert not np.array_equal(first, train(c, device=5)[1].update)
    assert not np.array_equal(first, train(config("trainable.embedding_rows.count=30"))[1].update)
