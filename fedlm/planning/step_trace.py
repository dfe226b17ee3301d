"""What one local step allocates and computes, found by running it on shapes alone.

The step of `fedlm.training.local` (body, loss, gradients) runs on torch's "meta" device, whose tensors have shapes and
no values. Every allocation is seen being born and dying, in the order of the real program, autograd's saved tensors
included; so nothing has to be kept in step with the models by hand, and any `LanguageModel` can be traced.

At a fixed sequence length T every size is affine in the sequences B of a batch and its counted targets N, so three
small traces give every batch exactly. What has one row for each row in play is recognised by its size: the traces have
a number of rows that nothing else has, just below two chunks of the full softmax; further chunks would repeat these.

Legend: E operations, A allocations, B sequences, T tokens, N counted targets, L rows in play, D width, K negatives.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fedlm.config.schema import LossConfig
from fedlm.errors import DataError
from fedlm.losses.loss import Loss, loss_of
from fedlm.models.base import LanguageModel
from fedlm.models.layers import Dropout
from fedlm.registry import LOSSES

aten = torch.ops.aten
_MOST_RESULTS = 20_000
_results: dict[Any, tuple[Any, ...]] = {}  # see `_repeated`
_FIX = "measure a device of it as benchmarks/device_memory.py does"
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class StepTrace:
    """One step's allocations and floating-point work, linear in (1, B, N, L).

    Arguments:
        births, deaths: (A,) the operation that makes an allocation, and the one before which it is gone.
        sizes: (A, 4) coefficients of its bytes.
        inner: (E, 4) coefficients of the bytes that an operation needs inside itself.
        flops: (4,) coefficients of the floating-point operations, 2 for each multiply-add; the last is of N L.
    """

    births: npt.NDArray[np.int64]
    deaths: npt.NDArray[np.int64]
    sizes: Floats
    inner: Floats
    flops: Floats

    def live_bytes(self, at: Floats, large: float) -> tuple[Floats, Floats]:
        """Return the bytes alive after each operation, (E,) in blocks of at least `large` bytes and (E,) in smaller.

        Arguments:
            at: (4,) the values 1, B, N, L.
            large: Bytes.
        """
        sizes, inner = self.sizes @ at, self.inner @ at  # (A,), (E,)
        is_large = sizes >= large
        in_large, in_small = (self._alive(np.where(which, sizes, 0.0)) for which in (is_large, ~is_large))
        is_large = inner >= large
        return in_large + np.where(is_large, inner, 0), in_small + np.where(is_large, 0, inner)

    def _alive(self, sizes: Floats) -> Floats:
        num_operations = len(self.inner)
        born = np.bincount(self.births, sizes, num_operations + 1)
        gone = np.bincount(self.deaths, sizes, num_operations + 1)
        return np.cumsum(born - gone)[:num_operations]


def trace_step(model: LanguageModel, loss: LossConfig, *, length: int, rows_train: bool) -> StepTrace:
    """Return the trace of a step of sequences of `length` tokens.

    Arguments:
        model: From `shapes_of`; its parameters with `requires_grad` train.
        loss: The section [loss].
        length: T.
        rows_train: Whether the rows in play are differentiated.

    Raises:
        DataError: The model does something that depends on values, which shapes alone do not have.
    """
    rows = 2 * loss.chunk - 1
    points = [(2, 8), (3, 8), (2, 9)]
    try:
        # The first run alone makes what a model keeps from then on, such as a causal mask.
        _, *records = [_record(model, loss, (b, length, n, rows), rows_train) for b, n in points[:1] + points]
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"the memory of {type(model).__name__} cannot be predicted from its shapes ({reason}); {_FIX}"
        ) from error
    first = records[0]
    if not all(r.births == first.births and r.deaths == first.deaths for r in records):
        raise DataError(
            f"the memory of {type(model).__name__} cannot be predicted: its program depends on sizes; {_FIX}"
        )
    solve = np.linalg.inv(np.array([(1, *point) for point in points], np.float64))
    sizes, inner, flops = (
        solve @ np.array([getattr(r, name) for r in records]) for name in ("sizes", "inner", "flops")
    )
    return StepTrace(
        births=np.array(first.births),
        deaths=np.array(first.deaths),
        sizes=_by_row(np.round(sizes.T), rows, model.d_model),
        inner=_by_row(np.round(inner.T), rows, model.d_model),
        flops=_work(np.round(flops), rows, loss),
    )


def _mean(
    kind: Loss,
    hidden: Tensor,
    targets: Tensor,
    table: Tensor,
    bias: Tensor | None,
    drawn: tuple[Tensor, Tensor] | tuple[None, None],
) -> Tensor:
    """Return the loss of tensors without values, which somebody's own may not take."""
    try:
        return kind.mean(hidden, targets, drawn[0], table, bias, drawn[1])
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"the memory of a step with loss.kind = {kind.config.kind!r} cannot be foreseen: its `mean` does not take "
            f"tensors without values ({reason}); compute it without looking at single values"
        ) from error


def _by_row(coefficients: Floats, rows: int, width: int) -> Floats:
    """Move what has the size of a table of `rows` rows from the constant to a coefficient of L: (A, 3) to (A, 4)."""
    constant = coefficients[:, 0]
    fixed = ~coefficients[:, 1:].any(axis=1)
    is_table = fixed & (np.isin(constant, [4 * rows, 4 * rows * width]))
    kept, per_row = np.where(is_table, 0, constant), np.where(is_table, constant / rows, 0)
    return np.column_stack([kept, coefficients[:, 1:], per_row])


def _work(flops: Floats, rows: int, loss: LossConfig) -> Floats:
    """Only the loss depends on N; the full softmax scores each target against all L rows in play."""
    return (
        np.append(flops, 0.0)
        if LOSSES.resolve(loss.kind).draws_negatives
        else np.array([*flops[:2], 0.0, flops[2] / rows])
    )


def shapes_of(model: LanguageModel) -> LanguageModel:
    """Return a copy of a model without values, on the "meta" device."""
    memo: dict[int, Any] = {id(model.dropout_generator): torch.Generator()}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if isinstance(module, Dropout):
            module.generator = None  # type: ignore[assignment]  # a generator has a device, and shapes have none
    return copied


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation below autograd, and each storage from its birth to its end."""

    def __init__(self, existing: Collection[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.births: list[int] = []
        self.deaths: list[int] = []
        self.sizes: list[int] = []
        self.inner: list[int] = []
        self.flops = 0
        self._existing = [tensor.untyped_storage() for tensor in existing]
        self._known: dict[int, object] = {storage._cdata: None for storage in self._existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _on_shapes(func, args, kwargs)
        packet = func._overloadpacket
        self.flops += _flops(packet, args, kwargs, out)
        self.inner.append(_inner_bytes(packet, args))
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        index = len(self.sizes)
        self.births.append(len(self.inner) - 1)
        self.deaths.append(-1)
        self.sizes.append(storage.nbytes())

        def gone(_: object) -> None:
            self.deaths[index] = len(self.inner)
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)


def _on_shapes(func: Any, args: Any, kwargs: Any) -> Any:
    if func is aten.nonzero.default:  # the chunk's own targets: how many depends on values, and they are few
        return torch.empty((1, args[0].dim()), dtype=torch.int64, device="meta")
    if func is aten.add.Tensor and not torch.is_grad_enabled() and args[0].shape == getattr(args[1], "shape", None):
        # Autograd adds a second gradient into the first, but not where a mode like ours could be watching.
        return args[0].add_(args[1])
    return _repeated(func, args, kwargs) if _makes_new(func) else func(*args, **kwargs)


@lru_cache(maxsize=1024)
def _makes_new(func: Any) -> bool:
    """Tell whether an operator says that it changes nothing and returns no view."""
    return not func._schema.is_mutable and not any(value.alias_info for value in func._schema.returns)


def _repeated(func: Any, args: Any, kwargs: Any) -> Any:
    """Call an operator whose result depends on shapes alone once for each of them: layers and traces repeat most."""
    key = (func, _signature(args), tuple((name, _signature(value)) for name, value in kwargs.items()))
    if (layout := _results.get(key)) is None:
        out = func(*args, **kwargs)
        if len(_results) >= _MOST_RESULTS:
            _results.clear()
        _results[key] = _layout(out, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
        return out
    if layout == ():
        return func(*args, **kwargs)
    new = [
        one and torch.empty_strided(*one[:2], dtype=one[2], device=one[3]) for one in layout[1]
    ]  # a gradient may be None
    return new[0] if layout[0] is Tensor else tuple(new)


def _signature(value: Any) -> Any:
    """Return what decides about a result; types too, since 1, 1.0 and True are equal."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(map(_signature, value))
    return type(value), value


def _layout(out: Any, arguments: list[Tensor]) -> tuple[Any, ...]:
    """Return the kind of a result and the layout of its tensors; () where calling again is safer."""
    found: list[Any] = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple) else [0]
    leaves = [leaf for leaf in found if isinstance(leaf, Tensor)]
    if not all(leaf is None or isinstance(leaf, Tensor) for leaf in found):
        return ()
    storages = {leaf.untyped_storage()._cdata for leaf in leaves}
    is_new = len(storages) == len(leaves) and storages.isdisjoint(t.untyped_storage()._cdata for t in arguments)
    layouts = [None if leaf is None else _signature(leaf) for leaf in found]
    whole = all(leaf.untyped_storage().nbytes() == _extent(leaf) and not leaf.storage_offset() for leaf in leaves)
    return (Tensor if isinstance(out, Tensor) else tuple, layouts) if is_new and whole else ()


def _extent(tensor: Tensor) -> int:
    """Return the bytes that `torch.empty_strided` gives a tensor of this layout."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _flops(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:  # torch counts it on accelerators alone
        return int(sdpa_flop_count(*(x.shape for x in args[:3])))  # type: ignore[no-untyped-call]
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(x.shape for x in args[:4])))  # type: ignore[no-untyped-call]
    return int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0


def _inner_bytes(packet: Any, args: Any) -> int:
    """Bytes of the temporary that an operation makes below what a mode can see."""
    if packet is aten.logsumexp:  # exp(x - max)
        return int(args[0].numel() * args[0].element_size())
    return 0


class _FusedAttention(TorchFunctionMode):
    """Takes the processor's fused attention where the real step takes it: shapes alone would take the plain one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fused = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
        if fused and func is nn.functional.scaled_dot_product_attention:
            q, k, v = args[:3]
            groups = q.shape[-3] // k.shape[-3]
            if groups > 1:
                k, v = (x.repeat_interleave(groups, -3) for x in (k, v))
            return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, kwargs.get("is_causal", False))[0]
        return func(*args, **kwargs)


def _record(model: LanguageModel, loss: LossConfig, sizes: tuple[int, int, int, int], rows_train: bool) -> _Recorder:
    B, T, N, L = sizes

    def shape(*sizes: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta", requires_grad=grad)

    kind = loss_of(loss)
    inputs, mask = shape(B, T, dtype=torch.int64), shape(B, T, dtype=torch.bool)
    counted, targets, negatives = (shape(n, dtype=torch.int64) for n in (N, N, loss.negatives))
    table_in = shape(L, model.d_model, grad=rows_train)  # (L, D)
    table_out = table_in if model.tied else shape(L, model.d_model, grad=rows_train)  # (L, D)
    bias = None if model.output_bias is None else shape(L, grad=rows_train)  # (L,)
    log_expected = shape(L)
    tables = [t for t in dict.fromkeys((table_in, table_out, bias)) if t is not None]
    existing = [inputs, mask, counted, targets, negatives, log_expected, *tables]
    leaves = [p for p in model.parameters() if p.requires_grad] + (tables if rows_train else [])

    def step() -> None:
        hidden = model.body(model.embed(embedding(inputs, table_in)), mask)  # (B, T, D)
        hidden = hidden.flatten(0, 1)[counted]  # (N, D)
        drawn = (negatives, log_expected) if kind.draws_negatives else (None, None)
        value = _mean(kind, hidden, targets, table_out, bias, drawn)
        del hidden
        if value.requires_grad:
            torch.autograd.grad(value, leaves, allow_unused=True)

    recorder = _Recorder([*existing, *model.parameters(), *model.buffers()])
    model.train()
    with torch.device("meta"), _FusedAttention(), recorder:  # what the model makes has no values either
        step()
    recorder.deaths = [len(recorder.inner) if death < 0 else death for death in recorder.deaths]
    return recorder
