"""The model that pfl trains in the comparison is fedlm's: checked here without pfl, on a small cell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.pfl_cells import BATCH, CELLS, LENGTH, Cell
from benchmarks.pfl_model import Transformer
from benchmarks.pfl_ours import cell_config, worker
from benchmarks.pfl_prepare import prepare
from benchmarks.pfl_throughput import TOLERANCE, relative_difference

NUM_USERS = 3
RATE_ONE = ("local.learning_rate=1", "local.row_learning_rate=1")


@pytest.fixture(params=[0, 4], ids=["all weights", "LoRA"])
def cell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with the arrays of a small cell called "small"."""
    monkeypatch.setitem(CELLS, "small", Cell(200, 16, 32, 2, 4, rank=request.param))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepare(
        "small",
        tmp_path / "cell",
        "synthetic",
        NUM_USERS,
        "synthetic.users=60",
        "synthetic.tokens_per_user=1100",
        "synthetic.classes=16",
        "fleet.cohort=2",
    )
    return tmp_path / "cell"


def plain_network(folder: Path) -> Transformer:
    network = Transformer(CELLS["small"], LENGTH, dropout=0.0)
    with np.load(folder / "weights.npz") as arrays:
        network.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    return network


def train_all(folder: Path, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
    """Plain SGD at learning rate 1 over all batches in order; returns the update by name."""
    network = plain_network(folder)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    for x, y in zip(inputs.split(BATCH), targets.split(BATCH), strict=True):
        gradients = torch.autograd.grad(network.loss(x, y), list(trained.values()))
        with torch.no_grad():
            for parameter, gradient in zip(trained.values(), gradients, strict=True):
                parameter -= gradient
    return {name: (p - before[name]).detach().numpy() for name, p in trained.items()}


def test_both_sides_compute_one_loss_and_one_gradient(cell: Path) -> None:
    with np.load(cell / "check.npz") as arrays:
        inputs, targets = (torch.from_numpy(arrays[name]) for name in ("inputs", "targets"))
    plain = train_all(cell, inputs, targets)
    loss = plain_network(cell).loss(inputs, targets).item()

    ours = worker(cell, cell_config("small", cell, *RATE_ONE))
    tokens = np.load(cell / "tokens.npy")[0, : BATCH * LENGTH + 1]
    update, our_loss = ours.update(tokens, 0)

    assert loss == pytest.approx(our_loss, rel=TOLERANCE)
    assert relative_difference(plain, ours.spec.views(update)) < TOLERANCE


def test_pfl_gets_the_batches_that_fedlm_trains_in_their_order(cell: Path) -> None:
    user = 2
    with np.load(cell / "batches.npz") as arrays:
        inputs, targets = (torch.from_numpy(arrays[name][user]) for name in ("inputs", "targets"))
    in_order, reversed_order = train_all(cell, inputs, targets), train_all(cell, inputs.flip(0), targets.flip(0))

    ours = worker(cell, cell_config("small", cell, *RATE_ONE))
    update, _ = ours.update(np.load(cell / "tokens.npy")[user], user)
    rounding = 1e-3  # four steps on an output bias of about -5: its last bit is 5e-7, its updates 1e-3
    assert relative_difference(in_order, ours.spec.views(update)) < rounding
    assert relative_difference(reversed_order, ours.spec.views(update)) > 3 * rounding


def test_padding_of_real_users_leaves_the_plain_loss_alone(cell: Path) -> None:
    network = plain_network(cell)
    x, y = torch.arange(8)[None], torch.arange(1, 9)[None]
    padded_x = torch.cat([x, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    padded_y = torch.cat([y, torch.full((1, 3), -100)], dim=1)
    assert network.loss(padded_x, padded_y).item() == pytest.approx(network.loss(x, y).item(), rel=1e-6)


def test_updates_of_other_blocks_never_count_as_equal() -> None:
    one = {"a": np.ones(3, np.float32)}
    assert relative_difference(one, one) == 0.0
    assert relative_difference({"b": one["a"]}, one) == float("inf")
    assert relative_difference({"a": np.ones((3, 1), np.float32)}, one) == float("inf")
