"""One codec for whatever is stored or sent: frozen dataclasses as plain data, as JSON text, or as arrays and scalars.

The type hints of a class are its format (`fedlm.codec_forms` has the table). A class is marked `coded`; classes any of
which a field may hold share a base that is marked `union`, and are told apart by their `name`. Numbers come back bit
for bit. Reading is strict: nothing is converted, guessed, filled in or left over, and nothing is imported or run but
`__post_init__` of marked classes, which checks ranges. Whatever is wrong is one `DataError` that names the place, the
value and what is allowed.

>>> from dataclasses import dataclass
>>> @coded
... @dataclass(frozen=True)
... class Span:
...     start: int
...     weights: tuple[float, ...]
>>> to_text(Span(3, (0.1, float("inf"))))
'{"start": 3, "weights": [0.1, "inf"]}'
>>> from_text(Span, '{"start": 3, "weights": [0.1, "inf"]}', where="stored span")
Span(start=3, weights=(0.1, inf))
>>> from_text(Span, '{"start": 3.0, "weights": []}', where="stored span")
Traceback (most recent call last):
fedlm.errors.DataError: stored span: start = 3.0 must be a whole number; it is damaged or of another version of fedlm
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

import numpy.typing as npt

from fedlm.codec_forms import Place, coded, coded_classes, form_of, record_form, union
from fedlm.errors import DataError

__all__ = ["coded", "coded_classes", "decode", "encode", "from_text", "join", "split", "to_text", "union"]

Value = TypeVar("Value")
Array = npt.NDArray[Any]


def encode(value: Any, kind: Any = None) -> Any:
    """Return a value as plain data: tables, lists, texts, numbers, true, false and null.

    Arguments:
        value: Of a class marked `coded`, or of what `kind` says.
        kind: The type that `decode` will be told, where it is not the value's own class: a base marked `union`, or a
            class that the value's class extends by fields that are not to be written.

    Raises:
        TypeError: The value is not what its type hints say, or has a type without a plain form: a fault of the program.
    """
    return form_of(type(value) if kind is None else kind).encode(value)


def decode(kind: type[Value], plain: Any, *, where: str) -> Value:
    """Return the value that `encode` made plain.

    Arguments:
        kind: The type that the value has to have.
        plain: From anywhere; nothing about it is trusted.
        where: What is read, for the error: "stored privacy plan".

    Raises:
        DataError: A field is missing or unknown, a value of a wrong type, or one that its class refuses.
    """
    made: Value = form_of(kind).decode(plain, Place(where))
    return made


def to_text(value: Any, kind: Any = None, *, indent: int | None = None) -> str:
    """Return a value as JSON without infinities; arguments as for `encode`."""
    return json.dumps(encode(value, kind), indent=indent, allow_nan=False)


def from_text(kind: type[Value], text: str | bytes, *, where: str) -> Value:
    """Return the value that `to_text` wrote; arguments as for `decode`.

    Raises:
        DataError: As `decode`, and for what is not JSON, a key that occurs twice in a table, NaN and Infinity.
    """
    try:
        plain = json.loads(text, object_pairs_hook=_without_twins, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); restore it or write it anew") from error
    return decode(kind, plain, where=where)


def split(value: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the fields of a value of a class marked `coded`: those that hold arrays, and the rest as plain data."""
    return record_form(type(value)).split(value)


def join(kind: type[Value], arrays: Mapping[str, Array], scalars: Mapping[str, Any], *, where: str) -> Value:
    """Return the value that `split` took apart; arrays are not copied. Other arguments and errors as for `decode`."""
    made: Value = record_form(kind).join(arrays, scalars, Place(where))
    return made


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError(f"a key occurs twice among {sorted(key for key, _ in pairs)}")
    return table


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")
