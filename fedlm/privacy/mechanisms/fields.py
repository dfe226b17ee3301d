"""A mechanism as JSON-ready values and back, with every type checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, asdict, fields
from typing import Any, TypeVar

from fedlm.errors import ConfigError, DataError
from fedlm.privacy.mechanisms.base import Mechanism, Participation
from fedlm.registry import MECHANISMS

AnyMechanism = TypeVar("AnyMechanism", bound=Mechanism)


def describe(mechanism: Any) -> dict[str, Any]:
    """Return the name and all fields of a mechanism that is a dataclass; tuples become lists."""
    values = {"name": MECHANISMS.reference(type(mechanism)), **asdict(mechanism)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def rebuild(cls: type[AnyMechanism], values: Mapping[str, Any]) -> AnyMechanism:
    """Return the mechanism that `describe` described.

    Raises:
        DataError: Another mechanism, a field missing, unknown, of a wrong type or out of range.
    """
    if values.get("name") != MECHANISMS.reference(cls):
        raise DataError(f"stored mechanism {values.get('name')!r} is not {cls.name!r}; restore the run folder")
    try:
        return cls(**_typed(cls, {key: value for key, value in values.items() if key != "name"}))
    except ConfigError as error:
        raise DataError(f"stored mechanism {cls.name!r}: {error}") from error


def _typed(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name: field for field in fields(cls)}
    if values.keys() != known.keys():
        raise DataError(
            f"stored {cls.__name__} has {sorted(values)}, must have {sorted(known)}; restore the run folder"
        )
    return {name: _value(known[name], value) for name, value in values.items()}


def _value(field: Field[Any], value: Any) -> Any:
    """Return the value as the field's type: whole number, text, finite numbers or participation rule."""
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    if kind == "Participation" and isinstance(value, Mapping):
        return Participation(**_typed(Participation, value))
    if kind == "tuple[float, ...]" and isinstance(value, list | tuple):
        if all(type(number) in (int, float) and math.isfinite(number) for number in value):
            return tuple(map(float, value))
    elif type(value).__name__ == kind:
        return value
    raise DataError(f"stored mechanism has {field.name} = {value!r}, must be of type {kind}; restore the run folder")
