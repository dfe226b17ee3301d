"""From the clipped sums of a step to its noised means, on the integer lattice of `fedlm.privacy.noise.lattice`.

Sums become integers in units of clip norm * 2^-40 (so z stays a ratio), get their noise there, and are divided by the
*expected* batch size. A coordinate moves by at most half a unit on the way, 2e-9 of the clip norm for 22 million of
them together. What the lattice cannot take back is the rounding inside the floating-point sums themselves, which
depends on how examples fell into physical batches: about 1e-7 of the sum's size in float32.

Blocks small enough for the cache go all the way one after the other, so no second copy of a model's gradients is made.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedlm.errors import FedlmError
from fedlm.privacy.noise.fixed_point import UNITS
from fedlm.privacy.noise.lattice import NoiseStream

_BLOCK = 65_536  # a multiple of the noise's own chunks
_LARGEST_SUM = 2.0**62  # in units; `fedlm.privacy.noise.lattice` asks for it

_DTYPES = (torch.float32, torch.float64)


def check_sums(sums: Mapping[str, Tensor], clip_norm: float) -> None:
    """Refuse sums that no clipped gradients can have; infinity as clip norm only asks for finite ones.

    Raises:
        FedlmError: Not finite, too large for the lattice, or of a type that it cannot be read from.
    """
    largest = _LARGEST_SUM * clip_norm / UNITS
    for name, value in sums.items():
        if value.dtype not in _DTYPES:
            raise FedlmError(f"the clipped sum of {name} is of {value.dtype}; sum in float32 or float64")
        low, high = torch.aminmax(value) if value.numel() else (torch.zeros(()), torch.zeros(()))
        # Written so that nan fails it too; the value itself is private and not shown.
        if not (max(-float(low), float(high)) < largest and torch.isfinite(low) and torch.isfinite(high)):
            raise FedlmError(
                f"the clipped sum of {name} is not finite or beyond any number of clipped gradients; its engine did "
                "not clip: nothing was released"
            )


def noised_means(
    sums: Mapping[str, Tensor], *, clip_norm: float, noise_multiplier: float, divisor: float, stream: NoiseStream
) -> dict[str, Tensor]:
    """Return `(sum + N(0, (z C)^2)) / divisor` of each parameter; every coordinate of every one gets noise.

    Arguments:
        sums: As `check_sums` wants them; overwritten, for a sum must not outlive its release.
        clip_norm: C, finite.
        noise_multiplier: z > 0.
        divisor: The expected batch size.
        stream: The step's, used here alone; names in alphabetical order take their draws from it.
    """
    unit = clip_norm / UNITS
    released = {}
    for name in sorted(sums):
        means = sums[name].detach().to("cpu").contiguous()
        _noise_blocks(means.view(-1).numpy(), unit, noise_multiplier * UNITS, unit / divisor, stream)
        released[name] = means.to(sums[name].device)
    return released


def _noise_blocks(values: npt.NDArray[np.floating], unit: float, std: float, scale: float, stream: NoiseStream) -> None:
    """Divide `values` by the unit, round, add noise of `std` units and multiply by `scale`, in place."""
    wide, lattice = np.empty(min(values.size, _BLOCK)), np.empty(min(values.size, _BLOCK), np.int64)
    for start in range(0, values.size, _BLOCK):
        part = values[start : start + _BLOCK]
        reals, units = wide[: part.size], lattice[: part.size]
        np.divide(part, unit, out=reals, dtype=np.float64)
        np.rint(reals, out=reals)
        np.copyto(units, reals, casting="unsafe")
        stream.add_to(units, std)
        np.multiply(units, scale, out=part, dtype=np.float64, casting="unsafe")
