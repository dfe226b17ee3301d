"""pfl's side of the comparison: runs in an environment of its own, where pfl is and fedlm is not.

A cohort goes through pfl's own path: `SimulatedBackend.gather_results` calls `FederatedAveraging` for each user, clips
with the central Gaussian mechanism and sums. The first cohort warms the heap and does not count; the noise, once a
round, is taken off the time, because these cohorts are far smaller than real ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend  # type: ignore[import-not-found]
from pfl.algorithm.base import NNAlgorithmParams  # type: ignore[import-not-found]
from pfl.algorithm.federated_averaging import FederatedAveraging  # type: ignore[import-not-found]
from pfl.data.federated_dataset import FederatedDataset  # type: ignore[import-not-found]
from pfl.data.pytorch import PyTorchTensorDataset  # type: ignore[import-not-found]
from pfl.data.sampling import get_user_sampler  # type: ignore[import-not-found]
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams  # type: ignore[import-not-found]
from pfl.model.pytorch import PyTorchModel  # type: ignore[import-not-found]
from pfl.privacy.gaussian_mechanism import GaussianMechanism  # type: ignore[import-not-found]
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism  # type: ignore[import-not-found]
from torch import Tensor

from benchmarks.measure import status_mb
from benchmarks.pfl_cells import BATCH, CELLS, CLIP_NORM, LEARNING_RATE, LENGTH
from benchmarks.pfl_model import Transformer


class TimedMechanism(CentrallyAppliedPrivacyMechanism):  # type: ignore[misc]
    """pfl's central mechanism; remembers what the noise cost."""

    noise_s = 0.0

    def postprocess_server(self, **arguments: Any) -> Any:
        """Add the noise, as pfl does."""
        started = time.process_time()
        result = super().postprocess_server(**arguments)
        self.noise_s += time.process_time() - started
        return result


class Side:
    """A model, its users and pfl around them.

    Arguments:
        network: With its weights.
        users: Each user's inputs and targets, (sentences, T) both.
        central: Makes the server's optimiser from the trained parameters.
        mechanism: pfl's central privacy, or None for none.
        route: "fp32", "onednn" (`set_float32_matmul_precision("medium")`) or "bf16" (pfl's `amp_dtype`).
    """

    def __init__(
        self,
        network: Transformer,
        users: Sequence[tuple[Tensor, Tensor]],
        central: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        mechanism: TimedMechanism | None,
        route: str = "fp32",
    ) -> None:
        if route == "onednn":
            torch.set_float32_matmul_precision("medium")
        self.users, self.mechanism = users, mechanism
        amp = torch.bfloat16 if route == "bf16" else None
        optimiser = central(p for p in network.parameters() if p.requires_grad)
        self.model = PyTorchModel(network, torch.optim.SGD, optimiser, amp_dtype=amp)
        data = FederatedDataset(self.user, get_user_sampler("minimize_reuse", list(range(len(users)))))
        self.backend = SimulatedBackend(data, data, postprocessors=[] if mechanism is None else [mechanism])
        self.algorithm: Any = FederatedAveraging()

    def user(self, number: int) -> Any:
        """Return one user's data as pfl takes it."""
        return PyTorchTensorDataset(self.users[number], user_id=str(number))

    def context(self, cohort: int, learning_rate: float = LEARNING_RATE) -> Any:
        """Return what pfl would send to a cohort in a round without evaluation."""
        parameters = NNAlgorithmParams(
            central_num_iterations=10**6, evaluation_frequency=10**6, train_cohort_size=cohort, val_cohort_size=None
        )
        training = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=learning_rate, local_batch_size=BATCH)
        contexts, _, _ = self.algorithm.get_next_central_contexts(
            self.model, 1, parameters, training, NNEvalHyperParams(local_batch_size=BATCH)
        )
        return contexts[0]

    def gather(self, size: int, learning_rate: float = LEARNING_RATE) -> Any:
        """Train the next `size` users and return the sum of their updates."""
        context = self.context(size, learning_rate)
        return self.backend.gather_results(self.model, self.algorithm, central_context=context)[0]


def load(folder: Path, cell: str, dropout: float) -> Transformer:
    """Return the network with the weights that both sides start from."""
    network = Transformer(CELLS[cell], LENGTH, dropout)
    with np.load(folder / "weights.npz") as arrays:
        network.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    return network


def measure(side: Side, devices: int) -> dict[str, float]:
    """Warm the heap with two users, then time a cohort; the noise does not count."""
    mechanism = side.mechanism
    assert mechanism is not None
    side.gather(2)
    mechanism.noise_s, started = 0.0, time.process_time()
    side.gather(devices)
    seconds = time.process_time() - started - mechanism.noise_s
    return {"devices_per_cpu_s": devices / seconds, "peak_mb": status_mb("VmHWM"), "noise_s": mechanism.noise_s}


def one_batch(side: Side, folder: Path, out: Path) -> dict[str, float]:
    """Train the batch of the check at learning rate 1 and store the update, minus the gradient, by name."""
    with np.load(folder / "check.npz") as arrays:
        inputs, targets = (torch.from_numpy(arrays[key]) for key in ("inputs", "targets"))  # (B, T)
    loss = side.model.pytorch_model.loss(inputs, targets).item()
    user = PyTorchTensorDataset((inputs, targets), user_id="0")
    update, _ = side.algorithm.simulate_one_user(side.model, user, side.context(1, learning_rate=1.0))
    np.savez(out, **{name: tensor.numpy() for name, tensor in update.items()})
    return {"loss": loss}


def server_sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return pfl's server optimiser for plain averaging."""
    return torch.optim.SGD(parameters, lr=1.0)


def main() -> None:
    """Measure one row in this process, which does nothing else, or train the batch of the check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cell", choices=CELLS, required=True)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--route", default="fp32")
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--check", type=Path, help="train one batch and store its update here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    baseline_mb = status_mb("VmRSS")
    with np.load(arguments.folder / "batches.npz") as arrays:
        inputs, targets = (torch.from_numpy(arrays[key]) for key in ("inputs", "targets"))  # (U, sentences, T)
    network = load(arguments.folder, arguments.cell, arguments.dropout)
    mechanism = TimedMechanism(GaussianMechanism(CLIP_NORM, 1.0))
    side = Side(network, list(zip(inputs, targets, strict=True)), server_sgd, mechanism, arguments.route)
    if arguments.check:
        print(json.dumps(one_batch(side, arguments.folder, arguments.check)))
    else:
        print(json.dumps(measure(side, arguments.devices) | {"baseline_mb": baseline_mb}))


if __name__ == "__main__":
    main()
