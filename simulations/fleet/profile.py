"""Profiles: what devices can do, from a CSV text, as one table for the whole fleet.

A row is a device class when the file has a column `share`, else one device; device d then has row d modulo the rows.
Every column may be left out and every cell left empty; what is not said does not limit the device. Columns:

    class           a name, for reports
    share           part of the fleet, in any unit (shares are divided by their sum)
    memory_mb       what the training process may use
    gflops          speed of training in fp32, in 1e9 floating-point operations a second
    down_mbit       download, Mbit/s
    up_mbit         upload, Mbit/s
    dropout         probability of leaving a round after the download
    spread          standard deviation of the log of a device's speed, and of its bandwidths, around the row's
    utc_offsets_h   local time minus UTC; several, set apart by spaces, are equally likely
    h00 ... h23     probability of being available in that hour of local time
"""

from __future__ import annotations

import csv
import math
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedlm.errors import DataError
from fedlm.suggest import nearest_word
from simulations.fleet.mixes import MIXES

Floats = npt.NDArray[np.float32]
Hours = npt.NDArray[np.float16]
HOURS = tuple(f"h{hour:02d}" for hour in range(24))
_CLASS, _OFFSETS, _SHARE = "class", "utc_offsets_h", "share"


@dataclass(frozen=True)
class Column:
    """A column of numbers: the value of an empty cell, and the range (`above` is exclusive)."""

    default: float
    low: float = 0.0
    above: float | None = None
    high: float = 1e9

    def allows(self, value: float) -> bool:
        """Tell whether a cell may hold this value; infinities and NaN never."""
        return self.low <= value <= self.high and (self.above is None or value > self.above)

    @property
    def allowed(self) -> str:
        """The range in words."""
        return f"a number {'>= ' + format(self.low, 'g') if self.above is None else '> 0'} and <= {self.high:g}"


_NUMBERS = {
    _SHARE: Column(math.nan, above=0),
    "memory_mb": Column(math.inf, above=0),
    "gflops": Column(math.inf, above=0),
    "down_mbit": Column(math.inf, above=0),
    "up_mbit": Column(math.inf, above=0),
    "dropout": Column(0.0, high=1),
    "spread": Column(0.0, high=3),
    **dict.fromkeys(HOURS, Column(1.0, high=1)),
}
_OFFSET = Column(0.0, low=-14, high=14)


@dataclass(frozen=True, eq=False)
class Profile:
    """A table of R device classes, or of R devices.

    Arguments:
        name: What the config calls it.
        digest: Names the content.
        classes: (R,) names of classes; empty when rows are devices.
        shares: (R,) their parts of the fleet, summing to 1; empty when rows are devices.
        memory_mb, gflops, down_mbit, up_mbit, dropout, spread: (R,), infinity where nothing limits.
        available: (R, 24) probability by hour of local time; fp16, so that a trace of a million devices stays small.
        offsets_h: All rows' UTC offsets, one row after another.
        num_offsets: (R,) how many of them each row has.
    """

    name: str
    digest: str
    classes: tuple[str, ...]
    shares: npt.NDArray[np.float64]
    memory_mb: Floats
    gflops: Floats
    down_mbit: Floats
    up_mbit: Floats
    dropout: Floats
    spread: Floats
    available: Hours
    offsets_h: Floats
    num_offsets: npt.NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.memory_mb)


def load_profile(name: str) -> Profile:
    """Return a built-in profile or that of a CSV file.

    Arguments:
        name: "uniform", "phones", or the path of a file.

    Raises:
        DataError: No such file, or a line of it that cannot be read; the message names file and line.
    """
    if name in MIXES:
        return parse_profile(MIXES[name].splitlines(keepends=True), name)
    try:
        with Path(name).expanduser().open(encoding="utf-8-sig", newline="") as lines:
            return parse_profile(lines, name)
    except FileNotFoundError:
        known = ", ".join(MIXES)
        raise DataError(f"fleet.profile = {name!r} is no file; choose {known}, or name a CSV file") from None
    except UnicodeDecodeError:
        raise DataError(f"fleet.profile {name} is not UTF-8; save it as UTF-8 text") from None
    except OSError as error:
        raise DataError(f"fleet.profile {name} cannot be read: {error.strerror}") from None


def parse_profile(lines: Iterable[str], name: str) -> Profile:
    """Return the profile of a CSV text; `name` stands in messages. Raises as `load_profile`."""
    table = _ProfileTable(name)
    rows = csv.reader(table.hashed(lines), strict=True)
    try:
        for cells in rows:
            if any(cell.strip() for cell in cells):
                table.take(cells, rows.line_num)
    except csv.Error as error:
        raise DataError(f"{name}:{rows.line_num}: {error}; quote fields as in any CSV file") from None
    return table.profile()


class _ProfileTable:
    """Reads row by row into flat arrays: a trace of a million devices is no million Python objects."""

    def __init__(self, name: str) -> None:
        self._name, self._digest = name, blake2b(digest_size=8)
        self._header: list[str] = []
        self._numbers = {column: array("d") for column in _NUMBERS}
        self._offsets, self._num_offsets = array("d"), array("q")
        self._classes: list[str] = []

    def hashed(self, lines: Iterable[str]) -> Iterable[str]:
        """Yield the lines, and remember what they were."""
        for line in lines:
            self._digest.update(line.encode())
            yield line

    def take(self, cells: list[str], line: int) -> None:
        """Take in a row, the first as the header."""
        cells = [cell.strip() for cell in cells]
        if not self._header:
            self._header = self._checked_header(cells, line)
            return
        if len(cells) != len(self._header):
            raise self._problem(line, f"{len(cells)} cells, but the header has {len(self._header)}")
        row = dict(zip(self._header, cells, strict=True))
        for name, column in _NUMBERS.items():
            self._numbers[name].append(self._number(row.get(name, ""), name, column, line))
        offsets = (row.get(_OFFSETS) or "0").split()
        self._offsets.extend(self._number(cell, _OFFSETS, _OFFSET, line) for cell in offsets)
        self._num_offsets.append(len(offsets))
        if self._has_classes:
            self._classes.append(row.get(_CLASS) or f"class {len(self._classes) + 1}")
            if not row[_SHARE]:
                raise self._problem(line, "share is empty; give every class a share above 0")

    def profile(self) -> Profile:
        """Return the table of all rows taken."""
        if not self._num_offsets:
            raise DataError(f"{self._name} has no rows; give a header and a row for each device class or device")
        shares = np.array(self._numbers[_SHARE] if self._has_classes else (), np.float64)  # (R,) or (0,)
        limits = ("memory_mb", "gflops", "down_mbit", "up_mbit", "dropout", "spread")
        return Profile(
            name=self._name,
            digest=self._digest.hexdigest(),
            classes=tuple(self._classes),
            shares=shares / shares.sum() if len(shares) else shares,
            **{name: np.array(self._numbers[name], np.float32) for name in limits},
            available=np.stack([np.array(self._numbers[hour], np.float16) for hour in HOURS], axis=1),  # (R, 24)
            offsets_h=np.array(self._offsets, np.float32),
            num_offsets=np.array(self._num_offsets, np.int64),
        )

    @property
    def _has_classes(self) -> bool:
        return _SHARE in self._header

    def _checked_header(self, names: list[str], line: int) -> list[str]:
        known = (_CLASS, _OFFSETS, *_NUMBERS)
        for name in names:
            if name not in known:
                hint = nearest_word(name, known)
                fix = f"did you mean {hint!r}?" if hint else f"known are {', '.join((*known[:9], 'h00 to h23'))}"
                raise self._problem(line, f"unknown column {name!r}; {fix}")
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise self._problem(line, f"column {name!r} occurs {count} times; keep one")
        return names

    def _number(self, cell: str, name: str, column: Column, line: int) -> float:
        if not cell:
            return column.default
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not column.allows(value):
            raise self._problem(line, f"{name} = {cell[:40]!r} is not allowed; expected {column.allowed}, or nothing")
        return value

    def _problem(self, line: int, what: str) -> DataError:
        return DataError(f"{self._name}:{line}: {what}")
