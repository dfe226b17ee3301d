"""Each loss and its gradients against a dense reference written out term by term."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlm.config.schema import LossConfig
from fedlm.losses.evaluation import score
from fedlm.losses.full_softmax import full_softmax_loss
from fedlm.losses.nce import nce_loss
from fedlm.losses.negatives import NoiseDistribution
from fedlm.losses.sampled_softmax import sampled_softmax_loss

N, D, V, K = 7, 5, 23, 11


@pytest.fixture
def problem() -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    q = torch.rand(V, generator=gen, dtype=torch.float64)
    return {
        "hidden": draw(N, D).requires_grad_(),
        "targets": torch.randint(V, (N,), generator=gen),
        "negatives": torch.randint(V, (K,), generator=gen),
        "table": draw(V, D).requires_grad_(),
        "bias": draw(V).requires_grad_(),
        "log_expected": (K * q / q.sum()).log(),
    }


def dense_nce(p: dict[str, Tensor]) -> Tensor:
    u = p["hidden"] @ p["table"].T + p["bias"] - p["log_expected"]  # (N, V)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(N):
        total = total - torch.log(torch.sigmoid(u[n, p["targets"][n]]))
        for k in p["negatives"]:
            total = total - torch.log(torch.sigmoid(-u[n, k]))
    return total / N


def dense_sampled(p: dict[str, Tensor]) -> Tensor:
    u = p["hidden"] @ p["table"].T + p["bias"] - p["log_expected"]
    total = torch.zeros((), dtype=torch.float64)
    for n in range(N):
        y = p["targets"][n]
        others = [u[n, k] for k in p["negatives"] if k != y]
        total = total + torch.logsumexp(torch.stack([u[n, y], *others]), 0) - u[n, y]
    return total / N


def gradients(loss: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [p["hidden"], p["table"], p["bias"]])


@pytest.mark.parametrize(("fast", "dense"), [(nce_loss, dense_nce), (sampled_softmax_loss, dense_sampled)])
def test_sampled_losses_equal_the_dense_reference(problem, fast, dense) -> None:  # type: ignore[no-untyped-def]
    ours, reference = fast(**problem), dense(problem)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=0)
    for a, b in zip(gradients(ours, problem), gradients(reference, problem), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
def test_chunked_softmax_equals_cross_entropy(problem: dict[str, Tensor], chunk: int) -> None:
    p = problem
    ours = full_softmax_loss(p["hidden"], p["targets"], p["table"], p["bias"], chunk)
    scores = p["hidden"] @ p["table"].T + p["bias"]
    reference = torch.nn.functional.cross_entropy(scores, p["targets"])
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=0)
    for a, b in zip(gradients(ours * 3, p), gradients(reference * 3, p), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_evaluation_is_the_full_softmax(problem: dict[str, Tensor]) -> None:
    p = problem
    result = score(p["hidden"], p["targets"], p["table"], p["bias"], num_bytes=31, chunk=4)
    scores = (p["hidden"] @ p["table"].T + p["bias"]).detach()
    nll = torch.nn.functional.cross_entropy(scores, p["targets"])
    log_z = torch.logsumexp(scores, -1)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-12)
    assert result.bits_per_byte == pytest.approx(N * float(nll) / math.log(2) / 31, rel=1e-12)
    assert result.log_z_mean == pytest.approx(float(log_z.mean()), rel=1e-12)
    assert result.log_z_std == pytest.approx(float(log_z.std(correction=0)), rel=1e-9)
    halves = [
        score(p["hidden"][s], p["targets"][s], p["table"], p["bias"], num_bytes=b, chunk=9)
        for s, b in ((slice(0, 3), 11), (slice(3, N), 20))
    ]
    assert (halves[0] + halves[1]).perplexity == pytest.approx(result.perplexity, rel=1e-12)


def test_nce_is_minimised_by_the_data_distribution() -> None:
    """With log Z fixed at zero, the minimiser over scores is log p itself: NCE learns normalised scores."""
    data = np.array([0.5, 0.3, 0.15, 0.05])
    q = np.array([0.25, 0.25, 0.25, 0.25])
    num_negatives = 3
    u = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    log_kq = torch.tensor(np.log(num_negatives * q))
    p, kq = torch.tensor(data), torch.tensor(num_negatives * q)
    optimiser = torch.optim.LBFGS([u], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> float:
        optimiser.zero_grad()
        softplus = torch.nn.functional.softplus
        loss = (p * softplus(-(u - log_kq))).sum() + (kq * softplus(u - log_kq)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    optimiser.step(closure)
    np.testing.assert_allclose(u.detach().exp().numpy(), data, rtol=1e-4)


def test_negatives_follow_the_noise_distribution() -> None:
    frequencies = np.array([0.6, 0.25, 0.1, 0.05])
    noise = NoiseDistribution(frequencies, LossConfig(negatives=200_000, noise_power=0.5), np.array([1, 3]))
    q = frequencies**0.5 / (frequencies**0.5).sum()
    counts = np.bincount(noise.draw(np.random.default_rng(0)), minlength=4)
    np.testing.assert_allclose(counts / 200_000, q, atol=4e-3)
    np.testing.assert_allclose(np.exp(noise.log_expected), 200_000 * q, rtol=1e-6)
    inside = NoiseDistribution(
        frequencies, LossConfig(negatives=1000, noise_power=0.5, negatives_from="rows"), np.array([1, 3])
    )
    assert set(inside.draw(np.random.default_rng(0)).tolist()) == {1, 3}
    assert np.isneginf(inside.log_expected[[0, 2]]).all()


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan, 3e38])
def test_a_diverged_model_has_a_score_that_is_a_number(poison: float) -> None:
    """The run folder's JSON has no NaN, and a score that is none would be refused as a lie."""
    hidden, table = torch.ones(N, D), torch.ones(V, D)
    table[3] = poison
    found = score(hidden, torch.arange(N), table, None, num_bytes=9, chunk=4)
    figures = (found.nll, found.log_z, found.log_z_squared, found.perplexity, found.bits_per_byte, found.log_z_std)
    assert all(math.isfinite(figure) for figure in figures)
    assert max(abs(figure) for figure in figures[:3]) < 1e100
    assert found.perplexity > 1e300
