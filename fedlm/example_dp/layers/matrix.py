"""Per-example gradients of a matrix: made, or only their norms (ghost norms; Li et al. 2021, arXiv 2110.05679), and
book-keeping (Bu et al. 2022, arXiv 2210.00038) instead of a second backward pass.

    G_i = sum_t g_(i,t) x_(i,t)^T                                        (out, in)
    |G_i|^2 = sum_(t,s) <x_(i,t), x_(i,s)> <g_(i,t), g_(i,s)>            two T x T Gram matrices
    sum_i f_i G_i = (f g)^T x                                            one product over all tokens

Either the gradients are made as they come, B out in numbers, or x and g are kept, B T (in + out) numbers, and the norm
is a ghost norm: whichever takes less memory. The choice is right for the time as well: T (in + out) < in out implies
T^2 < in out / 4, so the Gram matrices are smaller than the gradient they replace.

Exact in real arithmetic. In floating point a ghost norm loses what cancels: its error is at most a few units of
rounding of `(sum_t |x_t| |g_t|)^2`. Examples for which that could exceed half of the clip rule's slack get their
gradient made, one at a time.

Legend: B examples, T tokens (calls of a recurrent module count as tokens).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedlm.example_dp.clip_rule import SLACK, accepted
from fedlm.example_dp.layers.grad_sampler import LargeGradSampler

_ERROR_UNITS = 8.0  # measured: 3.5 at most, for tokens of very different lengths
_LARGEST = 1e6
"""Beyond this, in float32, a Gram matrix can lose to underflow what the other side's size would make count."""


class MatrixGradSampler(LargeGradSampler):
    """The weight of a linear module.

    Arguments:
        name: Of the parameter.
        parameter: (out, in), or (in, out) if transposed.
        is_transposed: GPT-2's `Conv1D`.
    """

    needs_input = True

    def __init__(self, name: str, parameter: nn.Parameter, num_examples: int, *, is_transposed: bool = False) -> None:
        super().__init__(name, parameter, num_examples)
        self._is_transposed = is_transposed
        self._gradient: Tensor | None = None  # (B, *parameter.shape)
        self._pairs: list[tuple[Tensor, Tensor]] = []  # (B, t, rows), (B, t, columns) of the parameter
        self._num_tokens = 0  # of the pairs
        self._alone: list[int] = []  # examples whose gradient is made by itself

    def receive(self, x: Tensor | None, gradient: Tensor) -> None:
        """Keep a call's input (B, ..., in) and output gradient (B, ..., out), or make the gradient of the parameter."""
        assert x is not None
        pair = [tensor.reshape(self.num_examples, -1, tensor.shape[-1]) for tensor in (gradient, x)]  # (B, t, .) each
        left, right = reversed(pair) if self._is_transposed else pair
        self._pairs.append((left, right))
        self._num_tokens += left.shape[1]
        rows, columns = self.parameter.shape
        if rows * columns <= self._num_tokens * (rows + columns):
            self._make_gradient()

    def squared_norms(self) -> Tensor:
        """Return (B,)."""
        if self._gradient is None:
            return self._ghost_norms() if self._pairs else self.zero_norms()
        self._make_gradient()
        # In float64: a float32 norm of millions of numbers alike is off by more than the clip rule's slack.
        norms: Tensor = torch.linalg.vector_norm(self._gradient.flatten(1), dim=1, dtype=torch.float64)  # (B,)
        return norms.square()

    def weighted_sums(self, factors: Tensor) -> Mapping[str, Tensor]:
        """Return the weighted sum, in the parameter's shape."""
        if self._gradient is not None:
            factors, gradient = accepted(factors, self._gradient)
            self._gradient = None
            return {self.name: torch.mv(gradient.flatten(1).T, factors).view(self.parameter.shape)}
        if not self._pairs:
            return {}
        pair, rest = self._joined(), factors.clone()
        self._pairs.clear()
        rest[self._alone] = 0
        kept, left, right = accepted(rest, *pair)
        scaled = (left * kept[:, None, None]).flatten(0, 1)  # (B T, rows)
        total = scaled.T @ right.flatten(0, 1)
        for i in self._alone:  # exactly what was measured: in a sum over tokens that cancel, rounding would count
            if factors[i] > 0:
                total.addcmul_(pair[0][i].T @ pair[1][i], factors[i])
        return {self.name: total}

    def _joined(self) -> tuple[Tensor, Tensor]:
        """Join the calls along time, once: (B, T, rows), (B, T, columns)."""
        if len(self._pairs) > 1:
            left, right = zip(*self._pairs, strict=True)
            self._pairs = [(torch.cat(left, 1), torch.cat(right, 1))]
        return self._pairs[0]

    def _make_gradient(self) -> None:
        if not self._pairs:
            return
        left, right = self._joined()
        self._pairs, self._num_tokens = [], 0
        if self._gradient is None:
            self._gradient = torch.bmm(left.transpose(1, 2), right)  # (B, rows, columns)
        else:
            self._gradient.baddbmm_(left.transpose(1, 2), right)

    def _ghost_norms(self) -> Tensor:
        left, right = self._joined()
        squares, bounds = ghost_norms(left, right)
        epsilon = torch.finfo(squares.dtype).eps
        is_extreme = torch.maximum(left.abs().amax((1, 2)), right.abs().amax((1, 2))) > _LARGEST  # (B,)
        is_unsure = is_extreme | (_ERROR_UNITS * epsilon * bounds > SLACK * squares)
        self._alone = is_unsure.nonzero().flatten().tolist()
        for i in self._alone:
            squares[i] = torch.linalg.vector_norm(left[i].T @ right[i], dtype=torch.float64).square()
        return squares


def ghost_norms(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return `|sum_t left_t right_t^T|^2` of each example, and what bounds its rounding error.

    Arguments:
        left: (B, T, rows).
        right: (B, T, columns).

    Returns:
        (B,), non-negative, and `(sum_t |left_t| |right_t|)^2`, (B,); the error is at most a few units of rounding of
        it.
    """
    grams = torch.bmm(left, left.transpose(1, 2)).mul_(torch.bmm(right, right.transpose(1, 2)))  # (B, T, T)
    lengths = grams.diagonal(dim1=1, dim2=2).sqrt().sum(1)  # (B,)
    return grams.flatten(1).sum(1).clamp_(min=0), lengths.square()
