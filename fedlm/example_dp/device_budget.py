"""Example-level DP-SGD on the devices of a federated run (`local.example_dp`): one budget, the same for every device.

In each round that it takes part in, a device makes a fixed number of DP-SGD steps on its own sequences and noises them
itself. What it sends is then private for each of its sequences, whoever sees it, the server included; this holds beside
the user-level guarantee of the aggregate and is accounted for apart from it.

Guarantee:
    Unit: one sequence (`data.sequence_length` tokens of one user), added or removed. Each of the device's steps is a
    Poisson-sampled Gaussian mechanism with the public rate q, and its sum is divided by a public number, so that not
    even the amount of text shows. The row set, negatives and the model that the device starts from do not depend on its
    data but through releases. A device whose rounds are spent stays away.
    The server is honest but curious: it counts the rounds, and asks again for an update that a lost worker or a restart
    took away. Sample and noise are then new, so a server that saw the first update too has seen one round more.
    Time: how long a device takes tells of its text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fedlm.config.schema import Config
from fedlm.privacy.accounting import subsampled_gaussian
from fedlm.privacy.guarantee import Guarantee, check_budget
from fedlm.rounding import rounded_up

_UNIT = "one training sequence of one device"
_ADJACENCY = "add or remove one sequence"
_REPRODUCIBLE = "NOT PRIVATE: privacy.reproducible_noise is on, who knows the seed can subtract the noise"


@dataclass(frozen=True)
class DeviceBudget:
    """What every device may spend.

    Arguments:
        sampling_rate: q, probability of each of a device's sequences to be in a step.
        noise_multiplier: z.
        steps: In one round.
        max_rounds: That a device takes part in.
        delta: Of the guarantee.
        clip_norm: C of one sequence's gradient.
        reproducible: Sample and noise follow from the seed, for debugging: NOT PRIVATE.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int
    max_rounds: int
    delta: float
    clip_norm: float
    reproducible: bool = False

    def epsilon(self, num_rounds: int) -> float:
        """Return what a device's sequence has spent after `num_rounds` rounds of that device."""
        return subsampled_gaussian.epsilon(
            sampling_probability=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
            rounds=num_rounds * self.steps,
            delta=self.delta,
        )

    def guarantee(self) -> Guarantee:
        """Return what all rounds of a device together guarantee each of its sequences, whoever sees what it sends."""
        return Guarantee(
            unit=_UNIT,
            adjacency=_ADJACENCY,
            epsilon=self.epsilon(self.max_rounds),
            delta=self.delta,
            sentences=self._sentences(),
            warnings=(_REPRODUCIBLE,) if self.reproducible else (),
        )

    def _sentences(self) -> tuple[str, ...]:
        return (
            f"Example-level differential privacy on each device with epsilon "
            f"{rounded_up(self.epsilon(self.max_rounds))} at delta {self.delta:g} (unit: {_UNIT}; adjacency: "
            f"{_ADJACENCY}), also against a server that keeps to the protocol, for at most {self.max_rounds:,} rounds "
            f"of a device, each tried once: {self.steps} steps a round, Poisson sampling of its sequences at q = "
            f"{self.sampling_rate:g}, noise multiplier z = {self.noise_multiplier:.4g}, clip norm C = "
            f"{self.clip_norm:g}, PLD accounting.",
            f"One round costs epsilon {rounded_up(self.epsilon(1))}.",
        )

    def parameters(self) -> dict[str, object]:
        """Return the public numbers that the guarantee rests on, JSON-ready."""
        return {
            "epsilon_of_one_round": self.epsilon(1),
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.clip_norm,
            "sampling_rate": self.sampling_rate,
            "steps": self.steps,
            "max_rounds": self.max_rounds,
        }


@lru_cache(maxsize=4)
def device_budget(config: Config) -> DeviceBudget | None:
    """Return the budget of a config's devices, its noise given or calibrated; None without `local.example_dp`.

    Raises:
        BudgetExceededError: Noise multiplier and epsilon are both given, and the rounds cost more.
    """
    local = config.local.example_dp
    if not local.enabled:
        return None
    max_rounds = min(local.max_rounds or config.rounds, config.rounds)
    z = local.noise_multiplier or subsampled_gaussian.noise_multiplier(
        sampling_probability=local.sampling_rate,
        rounds=max_rounds * local.steps,
        epsilon=local.epsilon,
        delta=local.delta,
    )
    budget = DeviceBudget(
        local.sampling_rate, z, local.steps, max_rounds, local.delta, local.clip_norm, config.privacy.reproducible_noise
    )
    check_budget(
        budget.epsilon(max_rounds),
        local.epsilon,
        what=f"local.example_dp.noise_multiplier = {z:.4g} in {max_rounds:,} rounds",
        fix="set it to 0 to calibrate it, or local.example_dp.max_rounds lower",
    )
    return budget
