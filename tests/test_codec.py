"""The codec: every class marked `coded` comes back bit for bit, and whatever is not its text is a `DataError`."""

from __future__ import annotations

import importlib
import json
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedlm.codec import coded, coded_classes, decode, encode, from_text, join, split, to_text, union
from fedlm.config.schema import OptionValue
from fedlm.errors import DataError
from fedlm.registry import DP_METRICS

PACKAGES = ("fedlm", "clients", "server", "simulations")
PRECIOUS = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


class Colour(Enum):
    """An enum whose names and values differ."""

    RED = 1
    BLUE = "RED"


@union()
class Shape:
    """A base of classes that are told apart."""

    name: ClassVar[str]


@coded
@dataclass(frozen=True)
class Circle(Shape):
    """One of them."""

    radius: float
    name: ClassVar[str] = "circle"


@coded
@dataclass(frozen=True)
class Square(Shape):
    """Another with the same field."""

    radius: float
    name: ClassVar[str] = "square"

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise ValueError(f"radius = {self.radius} must be >= 0")


@coded
@dataclass(frozen=True, eq=False)
class Everything:
    """A field of each type that has a plain form."""

    flag: bool
    count: int
    rate: float
    word: str
    data: bytes
    colour: Colour
    mode: Literal["a", "b", 1]
    limit: int | None
    rates: tuple[float, ...]
    pair: tuple[int, str]
    words: list[str]
    table: Mapping[str, tuple[int, ...]]
    shape: Shape
    shapes: tuple[Shape, ...]
    vector: npt.NDArray[np.float32]
    whatever: npt.NDArray[Any] | None


def marked() -> list[type[Any]]:
    """Return every class of the packages that is marked, whichever file it is in, and the ones above."""
    root = Path(__file__).resolve().parents[1]
    for file in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        if "\n@coded\n" in file.read_text(encoding="utf-8"):
            importlib.import_module(".".join(file.relative_to(root).with_suffix("").parts))
    ours = [cls for cls in coded_classes() if cls.__module__.partition(".")[0] in PACKAGES]
    return [Everything, Circle, Square, *(cls for cls in ours if cls.__module__ != "fedlm.codec")]


CLASSES = marked()
counts = st.integers(1, 12)
shares = st.floats(0.001, 0.2)
positive = st.floats(1e-6, 1e6)


@st.composite
def rules(draw: st.DrawFn, samplers: tuple[str, ...]) -> Any:
    """Participation rules that mechanisms take."""
    from fedlm.privacy.mechanisms import Participation

    sampler = draw(st.sampled_from(samplers))
    cohort, rounds, most = draw(counts), draw(st.integers(12, 40)), draw(st.integers(4, 12))
    apart = draw(st.integers(1, 4)) if sampler in ("cyclic_poisson", "separated") else 1
    cap = draw(counts) if sampler == "truncated_poisson" else 0
    return Participation(sampler, cohort * most, cohort, rounds, cap, apart, draw(st.sampled_from([0, rounds])))


@st.composite
def mechanisms(draw: st.DrawFn, cls: Any) -> Any:
    """A mechanism whose own options fit its rule."""
    rule = draw(rules(cls.samplers))
    chain = [0.9, 0.6, 0.5, draw(st.floats(0.01, 0.4))]
    options: dict[str, dict[str, Any]] = {
        "banded": {"bands": draw(st.integers(1, rule.separation))},
        "blt": {"poles": tuple(chain[0::2]), "zeros": tuple(chain[1::2])},
        "skellam": {
            "size": draw(counts), "grid_bits": draw(st.integers(4, 18)), "min_survivors": 1, "max_devices": rule.cohort,
        },
    }  # fmt: skip
    return cls(rule, **options.get(cls.name, {}))


def made_with(cls: type[Any], **chosen: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Values of a class, some fields chosen and the rest by their types; what the class refuses is drawn again."""
    hints = get_type_hints(cls)
    named = {item.name: hints[item.name] for item in fields(cls)}
    drawn = {name: chosen[name] if name in chosen else values_of(hint) for name, hint in named.items()}

    def build(values: dict[str, Any]) -> Any:
        try:
            return cls(**values)
        except ValueError:
            reject()

    return st.fixed_dictionaries(drawn).map(build)


def tuples(strategy: st.SearchStrategy[Any], size: int) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.tuples(*[strategy] * size)


def special(cls: type[Any]) -> st.SearchStrategy[Any] | None:
    """Return values of a class whose fields constrain each other; None where types tell enough."""
    from fedlm.models.re_attention import noise_levels
    from fedlm.privacy import mechanisms as rooms
    from fedlm.privacy.adaptive import allocation
    from fedlm.privacy.adaptive import rule as adaptive_rule
    from fedlm.privacy.clipping import block_scaling, clip_spec, side_queries
    from fedlm.privacy.noise import skellam_encoding

    if issubclass(cls, rooms.Mechanism):
        return mechanisms(cls)
    if cls is side_queries.DPMetrics:
        names = st.lists(st.sampled_from(DP_METRICS.built_in), max_size=3).map(tuple)
        return made_with(cls, share=shares, names=names)
    if cls is side_queries.ClipBit:
        return made_with(cls, share=shares, quantile=st.floats(0.01, 0.99))
    if issubclass(cls, side_queries.SideQuery):
        return made_with(cls, share=shares, **dict.fromkeys(("num_groups", "vocabulary_size"), counts))
    if cls is noise_levels.NoiseLevels:
        variances = st.floats(0, 1e9, width=32)
        rows = arrays(np.float32, array_shapes(max_dims=1, min_side=0), elements=variances)
        return made_with(cls, rows=rows, weights=st.dictionaries(st.text(), variances, max_size=3))
    special_fields: dict[type[Any], dict[str, st.SearchStrategy[Any]]] = {
        block_scaling.BlockScaling: {
            "spans": st.just(((0, 4, 0), (4, 5, 1))), "scales": tuples(positive, 2),
            "limits": st.sampled_from([(), (0.6, 0.8)]), "noise": st.one_of(st.just(()), tuples(st.floats(1, 9), 2)),
        },
        skellam_encoding.Skellam: {
            "population": st.just(99), "cohort": counts, "rounds": st.integers(12, 90), "delta": shares, "size": counts,
            "noise_multiplier": st.floats(0.1, 1), "grid_bits": st.integers(4, 18), "min_survivors": st.just(1),
            "max_devices": st.integers(12, 99), "max_participations": counts,
            "debug_key": st.sampled_from(["", "0123456789abcdef" * 2]),
        },
        clip_spec.ClipSpec: {
            "clip_norm": positive,
            "side_queries": st.lists(values_of(side_queries.SideQuery), max_size=3).map(tuple),
        },
        allocation.AllocationState: {
            **{name: tuples(values_of(float), 3) for name in ("scales", "moments", "sensitivity", "uncertainty")},
            "num_rounds": counts,
        },
        adaptive_rule.AdaptiveState: {"clip_norm": st.one_of(positive, st.just(math.inf))},
        adaptive_rule.AdaptiveRule: {
            "allocation": st.sampled_from(allocation.KINDS), "metrics": tuples(st.text(), 2),
        },
    }  # fmt: skip
    return made_with(cls, **special_fields[cls]) if cls in special_fields else None


@cache
def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Return values of any type that a field may have."""
    origin, arguments = get_origin(hint), get_args(hint)
    plain: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(), int: st.integers(), float: st.floats(), str: st.text(), bytes: st.binary(),
        types.NoneType: st.none(),
    }  # fmt: skip
    if hint in plain:
        return plain[hint]
    if hint == OptionValue:
        finite = st.floats(allow_nan=False, allow_infinity=False)
        return st.one_of(st.booleans(), st.integers(), finite, st.text(), st.lists(st.text(), max_size=3).map(tuple))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is types.UnionType:
        return st.one_of(*map(values_of, arguments))
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=4)
    if origin is tuple and arguments[1:] == (...,):
        return st.lists(values_of(arguments[0]), max_size=4).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, arguments))
    if origin is Mapping:
        return st.dictionaries(st.text(), values_of(arguments[1]), max_size=3)
    if origin is np.ndarray:
        scalar = get_args(arguments[1])[0]
        dtypes = st.sampled_from([np.float64, np.int8, ">u4", bool, np.complex64]) if scalar is Any else st.just(scalar)
        return dtypes.flatmap(lambda dtype: arrays(dtype, array_shapes(min_dims=0, min_side=0, max_dims=2)))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(hint)
    kinds = [cls for cls in CLASSES if issubclass(cls, hint)]
    if kinds != [hint]:
        return st.one_of(*map(values_of, kinds))
    found = special(hint)
    return made_with(hint) if found is None else found


def bits(value: Any) -> Any:
    """Return a value as something that is equal only for equal types and equal bits; nothing of the codec in it."""
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, float):
        return "float", "nan" if math.isnan(value) else value.hex()
    if isinstance(value, Mapping):
        return "table", {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [bits(item) for item in value]
    if hasattr(type(value), "__dataclass_fields__"):
        return type(value), [(item.name, bits(getattr(value, item.name))) for item in fields(value)]
    return type(value), value


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@PRECIOUS
@given(data=st.data())
def test_every_coded_class_comes_back_bit_for_bit(cls: type[Any], data: st.DataObject) -> None:
    value = data.draw(values_of(cls))
    text = to_text(value)
    assert bits(from_text(cls, text, where="it")) == bits(value)
    json.loads(text, parse_constant=pytest.fail)
    arrays, scalars = split(value)
    assert not arrays.keys() & scalars.keys()
    again = join(cls, arrays, json.loads(json.dumps(scalars)), where="it")
    assert bits(again) == bits(value)
    assert all(getattr(again, name) is array for name, array in arrays.items())


JUNK: list[Any] = [
    None, True, 0, 1, -1, 10**400, 0.5, -1.0, 1e308, 5e-324, "", "inf", "nan", "1", "AA", "Infinity", [], [0], [0.5],
    {}, {"name": "circle"}, {"x": 1}, [[]], "\ud800", "O", "|O8",
]  # fmt: skip


def places(plain: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each `(table or list, key)` of plain data."""
    keys = list(plain) if isinstance(plain, dict) else range(len(plain)) if isinstance(plain, list) else []
    for key in keys:
        yield plain, key
        yield from places(plain[key])


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@PRECIOUS
@given(data=st.data())
def test_changed_plain_data_is_refused_or_is_exactly_another_value(cls: type[Any], data: st.DataObject) -> None:
    plain = json.loads(to_text(data.draw(values_of(cls))))
    holder, key = data.draw(st.sampled_from(list(places([plain]))))
    if holder == [plain]:
        plain = data.draw(st.sampled_from(JUNK))
    elif data.draw(st.booleans()):
        holder[key] = data.draw(st.sampled_from(JUNK))
    else:
        del holder[key]
    refused_or_exact(cls, json.dumps(plain))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@PRECIOUS
@given(data=st.data())
def test_edited_text_is_refused_or_is_exactly_another_value(cls: type[Any], data: st.DataObject) -> None:
    text = to_text(data.draw(values_of(cls)))
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 6)))
    refused_or_exact(cls, text[:start] + data.draw(st.text('0123456789"[]{},:.-einfa \\', max_size=4)) + text[stop:])


def refused_or_exact(cls: type[Any], text: str) -> None:
    """Read a text: either a one-line `DataError`, or a value that is written as this text again."""
    try:
        value, reason = from_text(cls, text, where="it"), ""
    except DataError as error:
        value, reason = None, str(error)
    if reason:
        assert reason.startswith("it")
        assert "\n" not in reason
        assert len(reason) < 2_000
    else:
        assert to_text(value) == json.dumps(json.loads(text))


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if fields(cls)], ids=lambda cls: cls.__name__)
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_missing_and_unknown_fields_are_named(cls: type[Any], data: st.DataObject) -> None:
    plain = encode(data.draw(values_of(cls)))
    for name in plain:
        with pytest.raises(DataError, match=f"lacks {name}, must have {', '.join(plain)}"):
            decode(cls, {key: value for key, value in plain.items() if key != name}, where="it")
    with pytest.raises(DataError, match="has unknown 'extra', must have"):
        decode(cls, plain | {"extra": 1}, where="it")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ('{"radius": 1.0, "radius": 2.0}', "a key occurs twice"),
        ('{"radius": NaN}', "NaN is no number"),
        ('{"radius": 1e999}', "radius = inf must be a number"),
        ('{"radius": 1}', "radius = 1 must be a number"),
        ('{"radius": true}', "radius = True must be a number"),
        ('{"radius": -1.0}', "it: radius = -1.0 must be >= 0"),
        ('["radius"]', r"it = \['radius'\] must be a table"),
        (b"\xff\xfe\xfd", "it is not JSON"),
    ],
)
def test_what_is_wrong_is_said(text: str | bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        from_text(Square, text, where="it")


def test_classes_of_a_union_are_told_apart_by_name() -> None:
    assert encode(Square(2.0), Shape) == {"name": "square", "radius": 2.0}
    assert encode(Square(2.0)) == {"radius": 2.0}
    for name in ("triangle", None, 3, ["square"]):
        with pytest.raises(DataError, match=r"it: name = .* must be one of circle, square"):
            decode(Shape, {"name": name, "radius": 2.0}, where="it")
    with pytest.raises(DataError, match="it: name = None must be one of circle, square"):
        decode(Shape, {"radius": 2.0}, where="it")
    with pytest.raises(TypeError, match="both Shape 'square'"):
        coded(dataclass(frozen=True)(type("Other", (Shape,), {"name": "square"})))


def test_a_class_below_a_union_that_is_not_marked_is_not_written() -> None:
    class Tilted(Square):
        """Would come back as another class."""

    with pytest.raises(TypeError, match="cannot encode"):
        encode(Tilted(1.0), Shape)


@dataclass(frozen=True)
class Unmarked:
    """Nobody said that it may be made from what was read."""

    count: int


def test_only_frozen_classes_that_are_marked_are_coded() -> None:
    for use in (lambda: encode(Unmarked(1)), lambda: decode(Unmarked, {"count": 1}, where="it")):
        with pytest.raises(TypeError, match="no plain form"):
            use()
    with pytest.raises(TypeError, match="must be a frozen dataclass"):
        coded(dataclass(type("Open", (), {})))


@pytest.mark.parametrize(
    "value",
    [Circle("1"), Circle(2**53 + 1), Circle(None)],  # type: ignore[arg-type]
)
def test_a_value_that_could_not_come_back_is_not_written(value: Circle) -> None:
    with pytest.raises(TypeError, match="cannot encode"):
        encode(value)


def test_numbers_of_numpy_and_whole_ones_are_written_as_their_fields_say() -> None:
    assert type(encode(Circle(3))["radius"]) is float
    assert type(encode(Circle(np.float64(0.1)))["radius"]) is float
    assert encode(np.int64(3), int) == 3


@coded
@dataclass(frozen=True)
class Sent:
    """A message."""

    values: npt.NDArray[np.float32]
    count: int


@pytest.mark.parametrize(
    ("arrays", "scalars", "says"),
    [
        ({}, {"count": 1}, "lacks values"),
        ({"values": np.zeros(2)}, {"count": 1}, r"values = array of float64 \(2,\) must be an array of float32"),
        ({"values": np.zeros(2, ">f4")}, {"count": 1}, "must be an array of float32"),
        ({"values": np.array([{}])}, {"count": 1}, "must be an array of float32"),
        ({"values": [1.0]}, {"count": 1}, "must be an array of float32"),
        ({"values": np.zeros(2, np.float32), "count": np.zeros(1)}, {}, "must be no array"),
        ({"values": np.zeros(2, np.float32)}, {"count": 1.0}, "count = 1.0 must be a whole number"),
        ({"values": np.zeros(2, np.float32)}, {"count": 1, "values": 1}, "both as arrays and as scalars"),
    ],
)
def test_arrays_of_another_type_are_refused(arrays: dict[str, Any], scalars: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=f"^it.*{says}"):
        join(Sent, arrays, scalars, where="it")


def test_a_shape_that_lies_about_its_data_is_refused() -> None:
    plain = encode(Sent(np.zeros(3, np.float32), 1))
    for change in ({"shape": [10**12]}, {"shape": [10**30]}, {"shape": [-3]}, {"dtype": "<f8"}, {"dtype": "O"}):
        with pytest.raises(DataError, match="it: values"):
            decode(Sent, plain | {"values": plain["values"] | change}, where="it")


@coded
@dataclass(frozen=True)
class Halved:
    """Its check divides, which fails for numbers beyond fp64."""

    count: int

    def __post_init__(self) -> None:
        if self.count / 2 < 0:
            raise ValueError(f"count = {self.count} must be >= 0")


@pytest.mark.parametrize(
    ("kind", "plain", "says"),
    [
        (int, True, "it = True must be a whole number"),
        (bool, 1, "it = 1 must be true or false"),
        (Literal["a", 1], True, "it = True must be one of a, 1"),
        (Literal["a", 1], 1.0, r"it = 1\.0 must be one of a, 1"),
        (Colour, 1, "it = 1 must be one of RED, BLUE"),
        (bytes, "AB==", "it = 'AB==' must be text in base64"),  # bits in the padding: AA== is the same byte
        (bytes, "A A=", "it = 'A A=' must be text in base64"),
        (tuple[int, str], [1], r"it = \[1\] must be a list of 2"),
        (Halved, {"count": -1}, "it: count = -1 must be >= 0"),
        (Halved, {"count": 10**400}, "it: integer division result too large"),
    ],
)
def test_what_is_nearly_right_is_refused(kind: Any, plain: Any, says: str) -> None:
    with pytest.raises(DataError, match=f"^{says}"):
        decode(kind, plain, where="it")
