"""The body of a model for a group of devices at once: frozen weights multiply all devices' tokens in one product, and
each device's own tensors stand beside them in a batch dimension.

A grouped body is the model's own module tree with its leaves exchanged, so there is one description of each model.
A leaf has values and gradients (G, ...) of what trains in it; its backward pass leaves the gradients there, and
autograd sees activations alone.

Shape legend: G devices, of which the first `num_active` still have batches; S sequences of a device, T tokens,
N = S T; rows of the body's input are device by device, (G S, T, D).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from fedlm.models.base import LanguageModel
from fedlm.models.layers import Dropout, Positions, keep_mask
from fedlm.trainable.build import Trainable
from fedlm.trainable.spec import Block, Vector

_NO_GRADIENT = torch.zeros((), requires_grad=True)  # makes a leaf whose input has no gradient part of the graph


class DeviceBatch:
    """What the devices of a group train outside the embedding, and the gradients of one step.

    Arguments:
        trainable: The model and what trains in it.
        moving: Names of the tensors that train; the others of `trainable` are frozen, as the model holds them.
        capacity: Most devices of a group.
        is_rounded: Frozen weights, and what they multiply, are rounded to bf16.
    """

    def __init__(
        self, trainable: Trainable, moving: Collection[str], capacity: int, *, is_rounded: bool = False
    ) -> None:
        self.capacity, self.num_active, self.is_rounded = capacity, 0, is_rounded
        self.dropouts: list[torch.Generator] = []
        self.sizes: list[tuple[int, int]] = []  # (sequences, tokens) of each active device's batch, without padding
        fixed = [block for block in trainable.spec.blocks if block.kind != "rows" and block.name in moving]
        self._owned = {id(trainable.parameters[b.name]): BatchedParameter(self, b, capacity) for b in fixed}

    def own(self, parameter: Tensor | None) -> BatchedParameter | None:
        """Return the devices' values of a parameter of the model, or None if it does not train."""
        return None if parameter is None else self._owned.get(id(parameter))

    def load(self, blocks: Mapping[str, Vector]) -> None:
        """Give every device the current values."""
        for own in self._owned.values():
            own.load(blocks[own.block.name])

    def changes(self, num_devices: int) -> Vector:
        """Return the fixed parts of the devices' updates (G, F): new minus old values."""
        parts = [own.change(num_devices) for own in self._owned.values()]
        return torch.cat(parts, 1).numpy() if parts else np.empty((num_devices, 0), np.float32)

    def start_step(self, num_active: int, sizes: list[tuple[int, int]]) -> None:
        """Begin a step of the first `num_active` devices."""
        self.num_active, self.sizes = num_active, sizes
        for own in self._owned.values():
            own.is_fresh = True

    @torch.no_grad()
    def descend(self, learning_rate: float, idle: Tensor) -> None:
        """Take one step of plain SGD with the gradients that the backward pass left.

        Arguments:
            learning_rate: Of all tensors.
            idle: Places of the devices that take no step.
        """
        for own in self._owned.values():
            if not own.is_fresh:
                if len(idle):
                    own.gradient[idle] = 0
                own.value.sub_(own.gradient, alpha=learning_rate)


class BatchedParameter:
    """One trained tensor of every device in a group."""

    def __init__(self, group: DeviceBatch, block: Block, capacity: int) -> None:
        self._group, self.block = group, block
        self._values = torch.empty(capacity, *block.shape)
        self._gradients = torch.empty(capacity, *block.shape)
        self._initial = torch.empty(block.shape)
        self.is_fresh = True  # nothing of this step is in the gradient yet

    def load(self, values: Vector) -> None:
        """Set all devices to the same values."""
        self._initial = torch.from_numpy(values)
        self._values.copy_(self._initial)

    def change(self, num_devices: int) -> Tensor:
        """Return how the devices' values have changed since `load`, (G, size)."""
        return (self._values[:num_devices] - self._initial).flatten(1)

    @property
    def value(self) -> Tensor:
        """Values of the active devices, (G, ...)."""
        return self._values[: self._group.num_active]

    @property
    def gradient(self) -> Tensor:
        """Gradients of the active devices, (G, ...)."""
        return self._gradients[: self._group.num_active]

    def add_product(self, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
        """Add scale * left @ right, (G, m, k) by (G, k, n), to the gradient."""
        self.gradient.baddbmm_(left, right, beta=float(not self.is_fresh), alpha=scale)
        self.is_fresh = False

    def add(self, gradient: Tensor) -> None:
        """Add a gradient (G, ...), or one of the first rows of the tensor (G, n, ...)."""
        if self.is_fresh:
            self.gradient.zero_()
            self.is_fresh = False
        self.gradient[:, : gradient.shape[1]].add_(gradient)


def unknown_tensors(trainable: Trainable) -> list[str]:
    """Return the trained tensors that no leaf of a grouped body knows."""
    leaves = [module for module in trainable.model.modules() if isinstance(module, tuple(_LEAVES))]
    known = {id(parameter) for leaf in leaves for parameter in leaf.parameters()}
    return [name for name, parameter in trainable.parameters.items() if id(parameter) not in known]


def group_body(model: LanguageModel, group: DeviceBatch) -> LanguageModel:
    """Return the model with its leaves exchanged for those of a group; it shares all frozen weights and tables."""

    def exchange(module: nn.Module) -> nn.Module:
        for kind, new_leaf in _LEAVES.items():
            if isinstance(module, kind):
                leaf: nn.Module = new_leaf(module, group)
                return leaf
        twin = copy.copy(module)
        twin.__dict__["_modules"] = {name: exchange(child) for name, child in module.named_children()}
        return twin

    body = exchange(model)
    assert isinstance(body, LanguageModel)
    return body


def _plain_linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module


class GroupLinear(nn.Module):
    """x W^T + b + s (x A^T) B^T, where each of W, b, A and B is common or the device's own.

    Arguments:
        linear: The frozen product.
        group: The devices.
        lora: peft's module around it, if any.
    """

    def __init__(self, linear: nn.Linear, group: DeviceBatch, lora: LoraLinear | None) -> None:
        super().__init__()
        self.group = group
        self.weight, self.bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        self.own_weight, self.own_bias = group.own(linear.weight), group.own(linear.bias)
        is_rounded = group.is_rounded and self.own_weight is None
        self.rounded = self.weight.bfloat16() if is_rounded else None  # (out, in)
        self.own_a = self.own_b = self.a = self.b = None
        self.scale = 0.0
        if lora is not None:
            factor_a, factor_b = (_plain_linear(f["default"]).weight for f in (lora.lora_A, lora.lora_B))
            self.a, self.b, self.scale = factor_a.detach(), factor_b.detach(), float(lora.scaling["default"])
            self.own_a, self.own_b = group.own(factor_a), group.own(factor_b)
        self._is_plain = self.rounded is None and not any((self.own_weight, self.own_bias, lora))

    def forward(self, x: Tensor) -> Tensor:
        """Map (G S, ..., in) to (G S, ..., out)."""
        if self._is_plain:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = _Linear.apply(x, _NO_GRADIENT, self)  # type: ignore[no-untyped-call]
        return y

    def factor_a(self) -> Tensor:
        """Return A of every active device, (G, R, in)."""
        assert self.a is not None
        return self.a.expand(self.group.num_active, -1, -1) if self.own_a is None else self.own_a.value

    def factor_b(self) -> Tensor:
        """Return B of every active device, (G, out, R)."""
        assert self.b is not None
        return self.b.expand(self.group.num_active, -1, -1) if self.own_b is None else self.own_b.value

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T + b of each device: (G, N, in) to (G, N, out)."""
        common_bias = self.bias if self.own_bias is None else None
        if self.rounded is not None:
            y = (x.flatten(0, 1).bfloat16() @ self.rounded.T).float().view(*x.shape[:2], -1)
            if common_bias is not None:
                y += common_bias
        elif self.own_weight is None:
            y = F.linear(x.flatten(0, 1), self.weight, common_bias).view(*x.shape[:2], -1)
        else:
            y = torch.bmm(x, self.own_weight.value.transpose(1, 2))
            if common_bias is not None:
                y += common_bias
        return y if self.own_bias is None else y.add_(self.own_bias.value[:, None])

    def product_gradient(self, grad: Tensor) -> Tensor:
        """Return grad W: (G, N, out) to (G, N, in)."""
        if self.own_weight is not None:
            return torch.bmm(grad, self.own_weight.value)
        if self.rounded is not None:
            return (grad.flatten(0, 1).bfloat16() @ self.rounded).float().view(*grad.shape[:2], -1)
        return (grad.flatten(0, 1) @ self.weight).view(*grad.shape[:2], -1)


class _Linear(torch.autograd.Function):
    """All of a `GroupLinear` in one node of the graph; the backward pass leaves gradients in the batched parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, layer: GroupLinear) -> Tensor:
        flat = x.reshape(layer.group.num_active, -1, x.shape[-1])  # (G, N, in)
        y = layer.product(flat)  # (G, N, out)
        low = None
        if layer.b is not None:
            low = torch.bmm(flat, layer.factor_a().transpose(1, 2))  # (G, N, R)
            y.baddbmm_(low, layer.factor_b().transpose(1, 2), alpha=layer.scale)
        ctx.save_for_backward(flat, low)
        ctx.layer, ctx.shape = layer, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        flat, low = ctx.saved_tensors
        layer: GroupLinear = ctx.layer
        grad = grad_outputs[0].reshape(*flat.shape[:2], -1)  # (G, N, out)
        g_x = layer.product_gradient(grad) if ctx.needs_input_grad[0] else None  # (G, N, in)
        if layer.own_weight is not None:
            layer.own_weight.add_product(grad.transpose(1, 2), flat)
        if layer.own_bias is not None:
            layer.own_bias.add(grad.sum(1))
        if layer.b is not None:
            g_low = torch.bmm(grad, layer.factor_b())  # (G, N, R)
            if layer.own_b is not None:
                layer.own_b.add_product(grad.transpose(1, 2), low, layer.scale)
            if layer.own_a is not None:
                layer.own_a.add_product(g_low.transpose(1, 2), flat, layer.scale)
            if g_x is not None:
                g_x.baddbmm_(g_low, layer.factor_a(), alpha=layer.scale)
        return None if g_x is None else g_x.view(ctx.shape), None, None


class GroupLayerNorm(nn.Module):
    """LayerNorm with a gain and a bias that are common or the device's own."""

    def __init__(self, norm: nn.LayerNorm, group: DeviceBatch) -> None:
        super().__init__()
        self.group, self.shape, self.eps = group, norm.normalized_shape, norm.eps
        self.gain: Tensor | None = None if norm.weight is None else norm.weight.detach()
        self.bias: Tensor | None = None if norm.bias is None else norm.bias.detach()
        self.own_gain, self.own_bias = group.own(norm.weight), group.own(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (G S, ..., D) to the same shape."""
        if self.own_gain is None and self.own_bias is None:
            return F.layer_norm(x, self.shape, self.gain, self.bias, self.eps)
        y: Tensor = _LayerNorm.apply(x, _NO_GRADIENT, self)  # type: ignore[no-untyped-call]
        return y

    def gains(self) -> Tensor:
        """Return the gain, (D,) or (G, 1, D)."""
        assert self.gain is not None
        return self.gain if self.own_gain is None else self.own_gain.value[:, None]

    def biases(self) -> Tensor:
        """Return the bias, (D,) or (G, 1, D)."""
        if self.bias is None:
            return torch.zeros(())
        return self.bias if self.own_bias is None else self.own_bias.value[:, None]


class GroupPositions(nn.Module):
    """Positions that are common or the device's own."""

    def __init__(self, positions: Positions, group: DeviceBatch) -> None:
        super().__init__()
        self._positions, self._group, self._own = positions, group, group.own(positions.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Add the first T positions to (G S, T, D)."""
        common = self._positions.first(x.shape[1])
        if self._own is None:
            return x + common.detach()
        return _AddPositions.apply(x, _NO_GRADIENT, self._own, self._group)  # type: ignore[no-untyped-call,no-any-return]


class GroupDropout(nn.Module):
    """Dropout in which every device draws the masks that it would draw alone."""

    def __init__(self, dropout: Dropout, group: DeviceBatch) -> None:
        super().__init__()
        self._rate, self._group = dropout.rate, group

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of (G S, T, D), or of a step (G S, D) of a recurrent model."""
        if self._rate == 0:
            return x
        G = self._group.num_active
        mask = x.new_zeros(G, x.shape[0] // G, *x.shape[1:])  # (G, S, T, D)
        for part, (S, T), generator in zip(mask, self._group.sizes, self._group.dropouts, strict=False):
            alone = torch.Size((S, T, x.shape[-1]))
            part[:S, :T] = keep_mask(alone, self._rate, generator)
        return x * mask.view(x.shape)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, norm: GroupLayerNorm) -> Tensor:
        normed, mean, inverse_std = torch.native_layer_norm(x, norm.shape, None, None, norm.eps)
        ctx.save_for_backward(x, normed, mean, inverse_std)
        ctx.norm = norm
        return torch.addcmul(norm.biases(), _by_device(normed, norm.group), norm.gains()).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, normed, mean, inverse_std = ctx.saved_tensors
        norm: GroupLayerNorm = ctx.norm
        grad = _by_device(grad_outputs[0], norm.group)  # (G, N, D)
        if norm.own_bias is not None:
            norm.own_bias.add(grad.sum(1))
        if norm.own_gain is not None:
            norm.own_gain.add((grad * _by_device(normed, norm.group)).sum(1))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        inner = (grad * norm.gains()).view(x.shape)
        needed = [True, False, False]
        g_x = torch.ops.aten.native_layer_norm_backward(
            inner, x, norm.shape, mean, inverse_std, None, None, needed
        )[0]  # fmt: skip
        return g_x, None, None


class _AddPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, own: BatchedParameter, group: DeviceBatch) -> Tensor:
        ctx.own, ctx.group = own, group
        T, D = x.shape[1:]
        return (x.view(group.num_active, -1, T, D) + own.value[:, None, :T]).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        ctx.own.add(grad.reshape(ctx.group.num_active, -1, *grad.shape[1:]).sum(1))  # (G, T, D)
        return grad, None, None, None


def _by_device(x: Tensor, group: DeviceBatch) -> Tensor:
    """Return (G S, ..., D) as (G, N, D)."""
    return x.reshape(group.num_active, -1, x.shape[-1])


_LEAVES: dict[type[nn.Module], Callable[[Any, DeviceBatch], nn.Module]] = {
    LoraLinear: lambda module, group: GroupLinear(_plain_linear(module.base_layer), group, module),
    nn.Linear: lambda module, group: GroupLinear(module, group, None),
    nn.LayerNorm: GroupLayerNorm,
    Positions: GroupPositions,
    Dropout: GroupDropout,
}
