"""A training loss with an option of its own, added from outside in one file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny_job import Job

from fedlm.config.load import load_config
from fedlm.losses.loss import loss_of

SMOOTH = '''
    """The exact softmax with smoothed targets."""
    from dataclasses import dataclass

    import torch

    from fedlm.config.schema import option
    from fedlm.losses.loss import Loss


    @dataclass(frozen=True)
    class SmoothOptions:
        weight: float = option(0.1, "weight of the uniform distribution in the target", low=0, high=0.5)


    class Smooth(Loss):
        """Softmax with label smoothing."""

        Options = SmoothOptions
        draws_negatives = False

        def mean(self, hidden, targets, negatives, table, bias, log_expected):
            scores = hidden @ table.T if bias is None else hidden @ table.T + bias
            return torch.nn.functional.cross_entropy(scores, targets, label_smoothing=self.options.weight)
'''
PAIRS = '''
    """One negative a batch decides by the sign of a score."""
    import torch

    from fedlm.losses.loss import Loss


    class Hinge(Loss):
        """A hinge between target and drawn words."""

        has_groups = {groups}

        def mean(self, hidden, targets, negatives, table, bias, log_expected):
            gap = 1 - (hidden * table[targets]).sum(-1, keepdim=True) + hidden @ table[negatives].T
            return gap.clamp(min=0).mean(-1).mean()

        def group_losses(self, hidden, weights, targets, negatives, ids):
            rows = targets[0], negatives[0]
            gap = 1 - (hidden * rows[0]).sum(-1, keepdim=True) + hidden @ rows[1].transpose(1, 2)
            return (gap.clamp(min=0).mean(-1) * weights).sum(-1)
'''
KIND, WEIGHT = "loss.kind=smooth:Smooth", "loss.options.weight"


def final(job: Job) -> np.ndarray:
    return np.asarray(load_file(job.run / "checkpoints" / "round_000002.safetensors")["values"])


def test_a_loss_beside_the_config_trains_devices_one_by_one(job: Job) -> None:
    job.write("smooth", SMOOTH)
    code, _, error = job.fedlm("simulate", KIND, f"{WEIGHT}=0.5", "privacy.enabled=false", quiet=False)
    assert code == 0, error
    assert "devices train one by one: loss.kind = 'smooth:Smooth' has no form for groups of devices" in error
    smoothed = final(job)
    (job.folder / "run").rename(job.folder / "first")
    job.simulate(KIND, f"{WEIGHT}=0", "privacy.enabled=false")
    assert np.abs(final(job) - smoothed).max() > 1e-3
    plain = final(job)
    (job.folder / "run").rename(job.folder / "second")
    job.simulate("loss.kind=full_softmax", "privacy.enabled=false")
    np.testing.assert_allclose(final(job), plain, rtol=0, atol=2e-3)  # without smoothing it is the built-in loss


def test_memory_is_planned_for_it_or_refused_by_name(job: Job) -> None:
    job.write("smooth", SMOOTH)
    code, found, error = job.fedlm("plan", KIND)
    assert code == 0, error
    assert {row["loss"] for row in found["settings"]} >= {"smooth:Smooth", "nce"}
    built_in = job.fedlm("plan", "loss.kind=full_softmax")[1]
    parts = [next(iter(p["memory_mb"].values()))["activations and gradients"] for p in (found, built_in)]
    assert parts[0] > parts[1] > 0  # it holds all scores at once
    job.write("looks", SMOOTH.replace("scores =", "assert float(hidden.sum()) is not None\n            scores ="))
    code, _, error = job.fedlm("plan", "loss.kind=looks:Smooth")
    assert code == 2
    assert "the memory of a step with loss.kind = 'looks:Smooth' cannot be foreseen" in error


def test_a_loss_with_a_form_for_groups_trains_in_groups_the_same(job: Job) -> None:
    values = []
    for groups in (True, False):
        name = f"hinge_{groups}".lower()
        job.write(name, PAIRS.format(groups=groups))
        job.simulate(f"loss.kind={name}:Hinge", "privacy.enabled=false", "strategy.kind=fedavg", "rounds=2")
        values.append(final(job))
        (job.folder / "run").rename(job.folder / name)
    np.testing.assert_allclose(values[0], values[1], rtol=0, atol=1e-5)
    assert np.abs(values[0]).max() > 0


def test_its_options_are_checked(job: Job) -> None:
    job.write("smooth", SMOOTH)
    assert f"did you mean '{WEIGHT}'?" in job.refusal(KIND, "loss.options.wieght=0.2")
    assert f"{WEIGHT} = 1 is not allowed; expected a number from 0 to 0.5" in job.refusal(KIND, f"{WEIGHT}=1")
    assert "has no gradients of single examples, which local.example_dp needs" in job.refusal(
        KIND, "local.example_dp.enabled=true", "local.example_dp.epsilon=1", "privacy.non_private_diagnostics=false"
    )


@pytest.mark.parametrize("kind", ["nce", "sampled_softmax"])
def test_built_in_losses_of_groups_are_their_means(kind: str) -> None:
    loss = loss_of(load_config(None, [f"loss.kind={kind}"]).loss)
    generator = torch.Generator().manual_seed(3)
    hidden, table = (torch.randn(n, 5, generator=generator) for n in (7, 11))
    targets, negatives = (torch.randint(11, (n,), generator=generator) for n in (7, 4))
    log_expected = torch.randn(11, generator=generator)
    alone = loss.mean(hidden, targets, negatives, table, None, log_expected)
    sides = [(table[ids][None], -log_expected[ids][None]) for ids in (targets, negatives)]
    weights = torch.full((1, 7), 1 / 7)
    group = loss.group_losses(hidden[None], weights, sides[0], sides[1], (targets[None], negatives[None]))
    torch.testing.assert_close(group[0], alone)
