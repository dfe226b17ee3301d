"""Phantom Clipping against brute force: one example at a time, torch.autograd on explicit tables, float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding

from fedlm.errors import ConfigError
from fedlm.example_dp.per_example_gradients import PerExampleGradients
from fedlm.example_dp.tables.phantom import TrainedTables
from fedlm.losses.full_softmax import full_softmax_loss
from fedlm.losses.nce import nce_loss
from fedlm.losses.sampled_softmax import sampled_softmax_loss

KINDS = ("full_softmax", "nce", "sampled_softmax")
ALL = frozenset({"input_table", "output_table", "output_bias"})
TOLERANCE = 1e-12
SCALE = 3.0  # of looked-up rows, as Gemma's


@dataclass
class Problem:
    """A batch, tables, and a body that mixes each example's positions."""

    tables: dict[str, Tensor]
    trained: frozenset[str]
    num_moving: int
    inputs: Tensor
    input_mask: Tensor
    targets: Tensor
    target_mask: Tensor
    mix: Tensor
    negatives: Tensor
    log_expected: Tensor

    @property
    def output_name(self) -> str:
        return "output_table" if "output_table" in self.tables else "input_table"

    def body(self, rows: Tensor) -> Tensor:
        """A causal map of (..., T, D)."""
        length = rows.shape[-2]
        causal = torch.ones(length, length, dtype=rows.dtype).tril() / length
        return torch.tanh(causal @ (SCALE * rows) @ self.mix) + rows

    def trained_tables(self) -> TrainedTables:
        return TrainedTables(
            input_table=self.tables["input_table"],
            output_table=self.tables.get("output_table"),
            output_bias=self.tables.get("output_bias"),
            trained=self.trained,
            num_moving=self.num_moving,
        )


def problem(seed: int, *, tied: bool = True, bias: bool = True, trained: frozenset[str] = ALL) -> Problem:
    """Return a small random batch; odd seeds have more positions than rows."""
    gen = torch.Generator().manual_seed(seed)
    whole = lambda low, high: int(torch.randint(low, high, (), generator=gen))  # noqa: E731
    real = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    batch, width, num_rows = whole(1, 5), whole(1, 7), whole(3, 12)
    length = whole(1, num_rows + 1) if seed % 2 == 0 else num_rows + whole(1, 9)
    ids = lambda *shape: torch.randint(num_rows, shape, generator=gen)  # noqa: E731
    tables = {"input_table": real(num_rows, width)}
    if not tied:
        tables["output_table"] = real(num_rows, width)
    if bias:
        tables["output_bias"] = real(num_rows)
    lengths = torch.randint(1, length + 1, (batch,), generator=gen)
    mask = torch.arange(length) < lengths[:, None]
    target_mask = mask & (torch.rand(batch, length, generator=gen) < 0.8)
    if batch > 1:
        target_mask[0] = False
    q = torch.rand(num_rows, generator=gen, dtype=torch.float64) + 0.1
    negatives = ids(whole(1, 9))
    log_expected = (len(negatives) * q / q.sum()).log()
    num_moving = num_rows if seed % 3 == 0 else whole(1, num_rows + 1)
    return Problem(
        tables, trained & tables.keys(), num_moving, ids(batch, length), mask, ids(batch, length), target_mask,
        real(width, width), negatives, log_expected,
    )  # fmt: skip


def phantom(
    p: Problem, kind: str, chunk: int = 4, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor, PerExampleGradients]:
    """Return the losses and squared norms of a pass, and its per-example gradients."""
    per_example, tables = PerExampleGradients(len(p.inputs)), p.trained_tables()
    hidden = p.body(tables.look_up(per_example, p.inputs, p.input_mask))
    if kind == "full_softmax":
        losses = tables.full_softmax(per_example, hidden, p.targets, p.target_mask, chunk)
    else:
        losses = tables.sampled(per_example, hidden, p.targets, p.target_mask, p.negatives, p.log_expected, kind)
    losses.backward(torch.ones_like(losses) if upstream is None else upstream)
    return losses.detach(), sum((c.squared_norms() for c in per_example.contributions), torch.zeros(())), per_example


def example_loss(p: Problem, kind: str, i: int, tables: dict[str, Tensor]) -> Tensor:
    """The loss of one example, alone, by the federated losses."""
    rows = embedding(p.inputs[i], tables["input_table"])
    frozen = embedding(p.inputs[i], p.tables["input_table"])
    hidden = p.body(torch.where(p.input_mask[i][:, None], rows, frozen))[p.target_mask[i]]
    output, bias = tables[p.output_name], tables.get("output_bias")
    targets = p.targets[i][p.target_mask[i]]
    if kind == "full_softmax":
        return full_softmax_loss(hidden, targets, output, bias, 5)
    sampled = nce_loss if kind == "nce" else sampled_softmax_loss
    return sampled(hidden, targets, p.negatives, output, bias, p.log_expected)


def brute_force(p: Problem, kind: str) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Return each example's loss, and its gradients with rows that do not move set to zero."""
    losses, gradients = [], []
    for i in range(len(p.inputs)):
        leaves = {name: table.clone().requires_grad_(name in p.trained) for name, table in p.tables.items()}
        loss = example_loss(p, kind, i, leaves)
        losses.append(loss.detach())
        names = sorted(p.trained)
        found = torch.autograd.grad(loss, [leaves[n] for n in names], allow_unused=True) if loss.requires_grad else ()
        each = {n: torch.zeros_like(p.tables[n]) for n in names}
        for name, gradient in zip(names, found, strict=bool(found)):
            if gradient is not None:
                each[name][: p.num_moving] = gradient[: p.num_moving]
        gradients.append(each)
    return torch.stack(losses), gradients


def norms_of(gradients: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([sum(g.square().sum() for g in each.values()).sqrt() for each in gradients])  # type: ignore[union-attr]


def check(p: Problem, kind: str, chunk: int = 4) -> None:
    losses, squares, per_example = phantom(p, kind, chunk)
    wanted_losses, gradients = brute_force(p, kind)
    wanted = norms_of(gradients)
    torch.testing.assert_close(losses, wanted_losses, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(squares.sqrt(), wanted, rtol=TOLERANCE, atol=TOLERANCE)
    factors = torch.linspace(0.0, 1.0, len(losses), dtype=torch.float64) if len(losses) > 1 else torch.tensor([0.3])
    sums = per_example.contributions[0].weighted_sums(factors)
    assert sums.keys() == p.trained
    for name, found in sums.items():
        total = sum(float(f) * each[name] for f, each in zip(factors, gradients, strict=True))
        torch.testing.assert_close(found, total, rtol=TOLERANCE, atol=TOLERANCE * float(wanted.max() + 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(20))
def test_tied_tables_match_one_example_at_a_time(kind: str, seed: int) -> None:
    check(problem(seed), kind, chunk=1 + seed % 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(20))
def test_untied_tables_match_one_example_at_a_time(kind: str, seed: int) -> None:
    check(problem(seed, tied=False), kind, chunk=1 + seed % 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "trained", [{"input_table"}, {"output_table"}, {"output_bias"}, {"input_table", "output_bias"}, {"output_table",
                "output_bias"}, {"input_table", "output_table"}],
)  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_any_part_of_the_tables_matches(kind: str, trained: set[str], tied: bool) -> None:
    for seed in (100, 101, 102):
        p = problem(seed, tied=tied, trained=frozenset(trained))
        if p.trained:
            p.mix.requires_grad_()
            check(p, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_models_without_output_bias_match(kind: str) -> None:
    for seed in (200, 201, 203):
        check(problem(seed, bias=False), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_tokens_negatives_and_hits(kind: str) -> None:
    p = problem(301)
    p.num_moving = len(p.tables["input_table"])
    p.inputs[:], p.targets[:] = 1, 1
    p.negatives = torch.tensor([1, 1, 2, 2, 2, 0])
    check(p, kind)


@pytest.mark.parametrize(("length", "width"), [(300, 120), (300, 20)])
def test_long_sequences_match_by_gram_matrices_and_by_slices(length: int, width: int) -> None:
    gen = torch.Generator().manual_seed(9)
    ids = torch.randint(40, (2, 2, length), generator=gen)
    mask = torch.arange(length) < torch.tensor([[length], [length - 70]])
    real = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    tables = {"input_table": real(900, width) / 4, "output_bias": real(900)}
    trained, empty = frozenset(tables), torch.empty(0)
    p = Problem(tables, trained, 900, ids[0], mask, ids[1], mask, real(width, width) / 9, empty, empty)
    check(p, "full_softmax", chunk=128)


def test_scores_that_grow_from_chunk_to_chunk_match() -> None:
    """Later chunks hold scores far above the reference of the first, which exponentials are relative to."""
    p = problem(6)
    p.tables["output_bias"] += torch.linspace(0, 900, len(p.tables["output_bias"]), dtype=torch.float64)
    check(p, "full_softmax", chunk=1)


@pytest.mark.parametrize("logit", [0.0, 3.0, 8.0, 13.0])
@pytest.mark.parametrize("width", [128, 16])
def test_float32_norms_hold_for_confident_predictions(width: int, logit: float) -> None:
    """The expansion |p - y|^2 = |p|^2 - 2 p_y + 1 would lose all digits here."""
    gen = torch.Generator().manual_seed(2)
    targets = torch.randint(200, (2, 160), generator=gen)
    table = torch.nn.functional.normalize(torch.randn(200, width, generator=gen), dim=1)
    hidden = logit * table[targets] + 0.1 * torch.randn(2, 160, width, generator=gen)
    norms = []
    for dtype in (torch.float32, torch.float64):
        per_example, mask = PerExampleGradients(2), torch.ones(2, 160, dtype=torch.bool)
        tables = TrainedTables(
            input_table=table.to(dtype), output_table=None, output_bias=None, trained=frozenset({"input_table"})
        )
        rows = tables.look_up(per_example, targets.roll(1, 1), mask)
        tables.full_softmax(per_example, hidden.to(dtype) + 0.01 * rows, targets, mask, 64).sum().backward()
        norms.append(per_example.contributions[0].squared_norms().sqrt())
    # Longer by what rounding can add to the sums, never shorter.
    torch.testing.assert_close(norms[0].double(), norms[1], rtol=1e-4, atol=1e-4)
    assert bool((norms[0].double() >= norms[1] * (1 - 1e-4) - 1e-6).all())


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_losses_scale_the_gradients(kind: str) -> None:
    p = problem(7)
    upstream = torch.linspace(0.5, 2.0, len(p.inputs), dtype=torch.float64)
    _, squares, per_example = phantom(p, kind, upstream=upstream)
    _, gradients = brute_force(p, kind)
    torch.testing.assert_close(squares.sqrt(), norms_of(gradients) * upstream, rtol=TOLERANCE, atol=TOLERANCE)
    sums = per_example.contributions[0].weighted_sums(torch.ones_like(upstream))
    for name, found in sums.items():
        total = sum(float(s) * each[name] for s, each in zip(upstream, gradients, strict=True))
        torch.testing.assert_close(found, total, rtol=1e-11, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_that_is_not_finite_spoils_no_other(kind: str) -> None:
    p = problem(5)
    assert len(p.inputs) > 1
    bad = len(p.inputs) - 1
    _, gradients = brute_force(p, kind)
    wanted = norms_of(gradients)
    whole_body = p.body

    def body(rows: Tensor) -> Tensor:
        poison = torch.zeros(len(rows), 1, 1, dtype=rows.dtype)
        poison[bad] = torch.nan
        return whole_body(rows) + poison

    p.body = body  # type: ignore[method-assign]
    p.target_mask[bad, 0] = True
    _, squares, per_example = phantom(p, kind)
    assert not squares[bad].isfinite()
    torch.testing.assert_close(squares[:bad].sqrt(), wanted[:bad], rtol=TOLERANCE, atol=TOLERANCE)
    factors = torch.ones(len(p.inputs), dtype=torch.float64)
    factors[bad] = 0
    for name, found in per_example.contributions[0].weighted_sums(factors).items():
        total = sum((each[name] for each in gradients[:bad]), torch.zeros(()))
        torch.testing.assert_close(found, total, rtol=1e-11, atol=1e-11)


def test_frozen_tables_leave_no_contribution_but_the_gradient_of_the_body() -> None:
    p = problem(4, trained=frozenset())
    p.mix.requires_grad_()
    _, _, per_example = phantom(p, "full_softmax")
    assert not per_example.contributions
    found, p.mix.grad = p.mix.grad, None
    sum(example_loss(p, "full_softmax", i, p.tables) for i in range(len(p.inputs))).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(found, p.mix.grad, rtol=1e-11, atol=1e-12)


def test_the_cross_term_counts() -> None:
    """The sum of the two sides' squares is not the norm of a tied table: what other libraries get wrong."""
    p = problem(12)
    _, squares, _ = phantom(p, "full_softmax")
    apart = problem(12)
    apart.tables["output_table"] = apart.tables["input_table"].clone()
    apart.trained = ALL
    _, without, _ = phantom(apart, "full_softmax")
    assert ((squares / without - 1).abs()[1:] > 1e-3).all()


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(ConfigError, match="'output_table' cannot train"):
        TrainedTables(
            input_table=torch.zeros(3, 2), output_table=None, output_bias=None, trained=frozenset({"output_table"})
        )
