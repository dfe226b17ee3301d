"""The plain form of each type that `fedlm.codec` stores and sends.

type hint                               plain data
bool, int, str, None, Literal of them   itself
float                                   itself; "inf", "-inf" or "nan"
bytes                                   text in base64
Enum                                    the member's name
X | None                                null or that of X
X | Y                                   that of the first that fits
tuple, list                             a list
Mapping[str, X]                         a table
numpy array                             a table of dtype, shape and base64; by itself in `split` and `join`
class marked `coded`                    a table of all its fields
base marked `union`                     the same, and "name"
"""

from __future__ import annotations

import base64
import contextlib
import math
import re
import reprlib
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from fedlm.errors import DataError, FedlmError

Kind = TypeVar("Kind", bound=type[Any])

_FIX = "it is damaged or of another version of fedlm"
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_WORDS = {bool: "true or false", int: "a whole number", str: "text", types.NoneType: "null"}
_DTYPE = re.compile(r"[<>|][biufc]\d{1,2}")
_TAG = "name"
_LONGEST_NAME = 60  # of a key that an error shows whole
_coded: dict[type[Any], None] = {}  # in the order of marking
_unions: dict[type[Any], Names] = {}


class Names(Protocol):
    """The classes that a field of a union may hold, such as a `fedlm.registry.Registry`."""

    @property
    def allowed(self) -> str:
        """What the names are, in words."""

    def reference(self, kind: type[Any]) -> str:
        """Return the name that is stored for a class."""

    def resolve(self, name: str) -> type[Any]:
        """Return the class of a name, or raise `FedlmError`."""


class _Marked:
    """The classes below a base that were marked `coded`, told by their `name`."""

    def __init__(self, base: type[Any]) -> None:
        self._base, self._kinds = base, dict[str, type[Any]]()

    @property
    def allowed(self) -> str:
        return f"one of {', '.join(self._kinds)}"

    def reference(self, kind: type[Any]) -> str:
        return str(getattr(kind, _TAG, ""))

    def resolve(self, name: str) -> type[Any]:
        if name not in self._kinds:
            raise DataError(f"unknown {self._base.__name__}")
        return self._kinds[name]

    def add(self, kind: type[Any]) -> None:
        tag = self.reference(kind)
        if (other := self._kinds.setdefault(tag, kind)) is not kind:
            raise TypeError(f"{kind.__qualname__} and {other.__qualname__} are both {self._base.__name__} {tag!r}")


def coded(cls: Kind) -> Kind:
    """Mark a frozen dataclass as stored or sent: its fields are a format, and its `__post_init__` checks what was read.

    Below a base that is marked `union` it becomes one of the classes that a field of that type may hold.
    """
    if not is_dataclass(cls) or not getattr(cls, "__dataclass_params__").frozen:  # noqa: B009  unknown to mypy
        raise TypeError(f"{cls.__qualname__} must be a frozen dataclass to be coded")
    for base in cls.__mro__[1:]:
        if isinstance(names := _unions.get(base), _Marked):
            names.add(cls)
    _coded[cls] = None
    return cls


def union(names: Names | None = None) -> Callable[[Kind], Kind]:
    """Mark a base class: a field of this type holds any of its subclasses that is marked `coded`.

    Arguments:
        names: What a class is called and found by; None: by its `name`, once it is marked.
    """

    def mark(base: Kind) -> Kind:
        _unions[base] = _Marked(base) if names is None else names
        return base

    return mark


def coded_classes() -> tuple[type[Any], ...]:
    """Return the classes marked so far."""
    return tuple(_coded)


class Place(NamedTuple):
    """Where in what was read a value stands, for the message of an error."""

    where: str
    path: str = ""

    def field(self, name: str) -> Place:
        """Return the place of a field or key of the value."""
        shown = name if name.isidentifier() and len(name) <= _LONGEST_NAME else _brief(name)
        return Place(self.where, f"{self.path}.{shown}" if self.path else shown)

    def item(self, index: int) -> Place:
        """Return the place of an item of the value."""
        return Place(self.where, f"{self.path}[{index}]")

    def __str__(self) -> str:
        """Return `where: path`."""
        return f"{self.where}: {self.path}" if self.path else self.where

    def refusal(self, value: Any, allowed: str) -> DataError:
        """Return the error that says what is allowed in place of the value."""
        found = f"array of {value.dtype} {value.shape}" if isinstance(value, np.ndarray) else _brief(value)
        return DataError(f"{self} = {found} must be {allowed}; {_FIX}")


class Form(ABC):
    """How the values of one type are made plain and read back."""

    @abstractmethod
    def encode(self, value: Any) -> Any:
        """Return the value as plain data, or raise `TypeError`."""

    @abstractmethod
    def decode(self, plain: Any, place: Place) -> Any:
        """Return the value, or raise `DataError`."""


class _Plain(Form):
    """bool, int, str and None: themselves."""

    def __init__(self, kind: type[Any]) -> None:
        self.kind = kind

    def encode(self, value: Any) -> Any:
        if self.kind is int and isinstance(value, np.integer):
            return int(value)
        return _require(value, type(value) is self.kind, self.kind)

    def decode(self, plain: Any, place: Place) -> Any:
        if type(plain) is not self.kind:
            raise place.refusal(plain, _WORDS[self.kind])
        return plain


class _Float(Form):
    """Numbers; whole ones that a field of this type holds are written as floats."""

    def encode(self, value: Any) -> Any:
        is_number = isinstance(value, int | float | np.floating) and not isinstance(value, bool)
        number = float(_require(value, is_number, float))
        _require(value, number == value or math.isnan(number), float)
        return number if math.isfinite(number) else str(number)

    def decode(self, plain: Any, place: Place) -> Any:
        if type(plain) is str and plain in _NON_FINITE:
            return _NON_FINITE[plain]
        if type(plain) is not float or not math.isfinite(plain):
            raise place.refusal(plain, "a number with a decimal point or exponent")
        return plain


class _Bytes(Form):
    def encode(self, value: Any) -> Any:
        return base64.b64encode(_require(value, isinstance(value, bytes), bytes)).decode()

    def decode(self, plain: Any, place: Place) -> Any:
        try:
            data = base64.b64decode(plain, validate=True) if type(plain) is str else b""
        except ValueError:
            data = b""
        if base64.b64encode(data).decode() != plain:  # not base64, or with bits in its padding
            raise place.refusal(plain, "text in base64")
        return data


class _Choice(Form):
    """One of some values, each with its plain form: Literal, Enum."""

    def __init__(self, choices: Mapping[Any, Any]) -> None:
        self.choices = choices

    def encode(self, value: Any) -> Any:
        known = next((plain for choice, plain in self.choices.items() if _same(choice, value)), self)
        return _require(known, known is not self, self.choices)

    def decode(self, plain: Any, place: Place) -> Any:
        for choice, form in self.choices.items():
            if _same(form, plain):
                return choice
        raise place.refusal(plain, f"one of {', '.join(map(str, self.choices.values()))}")


class _Optional(Form):
    def __init__(self, inner: Form) -> None:
        self.inner = inner

    def encode(self, value: Any) -> Any:
        return None if value is None else self.inner.encode(value)

    def decode(self, plain: Any, place: Place) -> Any:
        return None if plain is None else self.inner.decode(plain, place)


class _Items(Form):
    """Lists, tuples of any length, and tuples of one form for each place."""

    def __init__(self, kind: type[Any], forms: list[Form], *, any_length: bool) -> None:
        self.kind, self.forms, self.any_length = kind, forms, any_length

    def encode(self, value: Any) -> Any:
        fits = isinstance(value, self.kind) and (self.any_length or len(value) == len(self.forms))
        items = _require(value, fits, self.kind)
        return [form.encode(item) for form, item in zip(self._forms_for(items), items, strict=True)]

    def decode(self, plain: Any, place: Place) -> Any:
        if not isinstance(plain, list) or not (self.any_length or len(plain) == len(self.forms)):
            raise place.refusal(plain, "a list" if self.any_length else f"a list of {len(self.forms)}")
        pairs = zip(self._forms_for(plain), plain, strict=True)
        return self.kind(form.decode(item, place.item(index)) for index, (form, item) in enumerate(pairs))

    def _forms_for(self, items: Sequence[Any]) -> list[Form]:
        return self.forms * len(items) if self.any_length else self.forms


class _Table(Form):
    def __init__(self, inner: Form) -> None:
        self.inner = inner

    def encode(self, value: Any) -> Any:
        keys_are_text = isinstance(value, Mapping) and all(type(key) is str for key in value)
        return {key: self.inner.encode(item) for key, item in _require(value, keys_are_text, dict).items()}

    def decode(self, plain: Any, place: Place) -> Any:
        return {key: self.inner.decode(item, place.field(key)) for key, item in _table(plain, place).items()}


class ArrayForm(Form):
    """Arrays of numbers of one type, or of any (`scalar` Any)."""

    def __init__(self, scalar: Any) -> None:
        self.scalar = scalar

    def fits(self, value: Any) -> bool:
        """Tell whether the value is such an array; never one of objects."""
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
            return False
        is_concrete = isinstance(self.scalar, type) and np.dtype(self.scalar).type is self.scalar
        return value.dtype == np.dtype(self.scalar) if is_concrete else True

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        return f"an array of {getattr(self.scalar, '__name__', 'numbers')}"

    def encode(self, value: Any) -> Any:
        array = _require(value, self.fits(value), self.allowed)
        data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
        return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}

    def decode(self, plain: Any, place: Place) -> Any:
        table = _table(plain, place, ("dtype", "shape", "data"))
        shape, name = table["shape"], table["dtype"]
        data = _Bytes().decode(table["data"], place.field("data"))
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise place.field("shape").refusal(shape, "a list of sizes")
        try:
            dtype = np.dtype(name if type(name) is str and _DTYPE.fullmatch(name) else "")
            array = np.frombuffer(data, dtype).reshape(shape)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise DataError(f"{place} is no array ({error}); {_FIX}") from error
        if not self.fits(array):
            raise place.refusal(array, self.allowed)
        return array


class RecordForm(Form):
    """A class marked `coded`."""

    def __init__(self, cls: type[Any]) -> None:
        self.cls = cls
        hints = get_type_hints(cls)
        self.forms = {field.name: form_of(hints[field.name]) for field in fields(cls) if field.init}

    def encode(self, value: Any) -> Any:
        value = _require(value, isinstance(value, self.cls), self.cls)
        return {name: form.encode(getattr(value, name)) for name, form in self.forms.items()}

    def decode(self, plain: Any, place: Place) -> Any:
        table = _table(plain, place, self.forms)
        values = {name: form.decode(table[name], place.field(name)) for name, form in self.forms.items()}
        return self._made(values, place)

    def split(self, value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the fields that hold arrays, and the others as plain data."""
        arrays: dict[str, Any] = {}
        scalars: dict[str, Any] = {}
        for name, form in self.forms.items():
            held = getattr(value, name)
            if isinstance(held, np.ndarray):
                arrays[name] = _require(held, _fits(form, held), f"{name} to be of its type")
            else:
                scalars[name] = form.encode(held)
        return arrays, scalars

    def join(self, arrays: Mapping[str, Any], scalars: Mapping[str, Any], place: Place) -> Any:
        """Return the value that `split` took apart."""
        if twice := sorted(arrays.keys() & scalars.keys()):
            raise DataError(f"{place} has {twice} both as arrays and as scalars; {_FIX}")
        table = _table({**scalars, **arrays}, place, self.forms)
        made = {}
        for name, form in self.forms.items():
            if name in arrays and not _fits(form, arrays[name]):
                raise place.field(name).refusal(arrays[name], _allowed(form))
            made[name] = arrays[name] if name in arrays else form.decode(table[name], place.field(name))
        return self._made(made, place)

    def _made(self, values: Mapping[str, Any], place: Place) -> Any:
        try:
            return self.cls(**values)
        except (ValueError, ArithmeticError) as error:  # of its __post_init__; numbers too large for a check included
            raise DataError(f"{place}: {error}") from error


class _Union(Form):
    """Any class below a base marked `union`."""

    def __init__(self, base: type[Any]) -> None:
        self.base = base

    def encode(self, value: Any) -> Any:
        cls = _require(type(value), isinstance(value, self.base) and type(value) in _coded, self.base)
        return {_TAG: _unions[self.base].reference(cls), **form_of(cls).encode(value)}

    def decode(self, plain: Any, place: Place) -> Any:
        table = _table(plain, place)
        cls = self._kind(table.get(_TAG), place.field(_TAG))
        return form_of(cls).decode({key: item for key, item in table.items() if key != _TAG}, place)

    def _kind(self, tag: Any, place: Place) -> type[Any]:
        names, why = _unions[self.base], ""
        try:
            kind = names.resolve(tag) if type(tag) is str else None
            if isinstance(kind, type) and issubclass(kind, self.base) and kind in _coded:
                return kind
        except FedlmError as error:
            why = f" ({error})"
        raise place.refusal(tag, f"{names.allowed}{why}")


def form_of(hint: Any) -> Form:
    """Return the form of a type hint.

    Raises:
        TypeError: There is none.
    """
    return _form_of(hint)


@cache
def _form_of(hint: Any) -> Form:
    if hint in _WORDS:
        return _Plain(hint)
    simple: dict[Any, type[Form]] = {float: _Float, bytes: _Bytes}
    if hint in simple:
        return simple[hint]()
    if hint in _unions:
        return _Union(hint)
    if hint in _coded:
        return RecordForm(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _Choice({member: member.name for member in hint})
    return _generic(hint, get_origin(hint), get_args(hint))


def record_form(cls: type[Any]) -> RecordForm:
    """Return the form of a class marked `coded`."""
    form = form_of(cls)
    assert isinstance(form, RecordForm), f"{cls.__qualname__} is not marked coded"
    return form


def _generic(hint: Any, origin: Any, arguments: tuple[Any, ...]) -> Form:
    if origin is Literal:
        return _Choice({choice: choice for choice in arguments})
    if origin in (Union, types.UnionType) and len(arguments) == 2 and types.NoneType in arguments:
        return _Optional(form_of(next(kind for kind in arguments if kind is not types.NoneType)))
    if origin in (Union, types.UnionType):
        return _OneOf([form_of(kind) for kind in arguments])
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        return _Items(origin, [form_of(arguments[0])], any_length=True)
    if origin is tuple:
        return _Items(tuple, [form_of(kind) for kind in arguments], any_length=False)
    if origin in (dict, Mapping) and arguments[0] is str:
        return _Table(form_of(arguments[1]))
    if origin is np.ndarray:
        return ArrayForm(get_args(arguments[1])[0])
    raise TypeError(f"{hint} has no plain form; mark the class as coded, or give the field another type")


class _OneOf(Form):
    """Values of one of some types, told apart by the plain data itself; where text is one, infinities are not."""

    def __init__(self, forms: Sequence[Form]) -> None:
        self._forms = sorted(forms, key=lambda form: isinstance(form, _Float))

    def encode(self, value: Any) -> Any:
        for form in self._forms:
            with contextlib.suppress(TypeError):
                plain = form.encode(value)
                if _same(self.decode(plain, Place("")), value):
                    return plain
        raise TypeError(f"cannot encode {_brief(value)}")

    def decode(self, plain: Any, place: Place) -> Any:
        for form in self._forms:
            with contextlib.suppress(DataError):
                return form.decode(plain, place)
        raise place.refusal(plain, "true or false, a number, text or a list of texts")


def _table(plain: Any, place: Place, names: Collection[str] | None = None) -> dict[str, Any]:
    """Return a table that has these keys and no others; None: any keys."""
    if not isinstance(plain, dict):
        raise place.refusal(plain, "a table")
    if names is not None and plain.keys() != set(names):
        missing, unknown = [name for name in names if name not in plain], [key for key in plain if key not in names]
        found = [f"lacks {', '.join(missing)}"] if missing else []
        found += [f"has unknown {', '.join(map(_brief, unknown[:3]))}"] if unknown else []
        raise DataError(f"{place} {' and '.join(found)}, must have {', '.join(names)}; {_FIX}")
    return plain


def _fits(form: Form, array: Any) -> bool:
    inner = form.inner if isinstance(form, _Optional) else form
    return isinstance(inner, ArrayForm) and inner.fits(array)


def _allowed(form: Form) -> str:
    inner = form.inner if isinstance(form, _Optional) else form
    return inner.allowed if isinstance(inner, ArrayForm) else "no array"


def _require(value: Any, holds: bool, kind: Any) -> Any:
    if not holds:
        raise TypeError(f"cannot encode {_brief(value)} as {kind}")
    return value


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def _brief(value: Any) -> str:
    return reprlib.repr(value)
