"""Clipped updates and their exact sum.

A device's update is clipped to L2 norm C and truncated to fixed point (int64, unit C * 2^-40) before
anything is added to it. Integer sums are associative, therefore

* the sum has the same bits for any number of workers, any grouping and any order of arrival, and
* the rounding of one device's contribution does not depend on who else is in the cohort. In a floating-point
  sum it does: adding one device changes how all others round, so two neighbouring sums differ by more than one
  clipped update, and the sensitivity that the noise is calibrated to is not the true one.

Truncation is toward zero and the clip leaves a margin of 2^-20 for the rounding of the norm and of the
factor, so the integer vector of a device has an exact L2 norm of at most 2^40 units, that is C.

The vector holds more than the update where a round asks more (`fedlm.privacy.clipping.side_queries`): the answers to
further queries follow it, and update and answers share the bound C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from fedlm.errors import BudgetExceededError, ConfigError, DataError
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.clipping.query_input import DeviceStats, QueryInput
from fedlm.privacy.clipping.side_queries import answer_units
from fedlm.privacy.noise.fixed_point import CAPACITY_UNCLIPPED, UNITS, FloatVector, IntVector
from fedlm.ranges import require_count
from fedlm.trainable.parts import Part, check_parts

_MARGIN = 2.0**-20
_ARRIVAL_MARGIN = 2.0**-30
_UNCLIPPED_PEAK = float(2**62 // CAPACITY_UNCLIPPED) / UNITS
_CHUNK = 16_384
# Devices whose integers are added up in fp64 before they join the sum: at most 2^46 units each (without clipping), and
# 2^6 of those stay below 2^53, where fp64 is exact.
_BATCH = 64
# OpenBLAS splits longer dot products over threads, and the last bit of the norm would then depend on their
# number.
_DOT = 8_192
_TOKEN = object()
_NO_DEVICE_STATS = DeviceStats()


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """What clipping did to one device: private data of that device, for sinks marked non-private only."""

    norm: float
    clipped: bool
    finite: bool


def new_sum(clip_spec: ClipSpec, size: int) -> ClippedSum:
    """Return an empty sum of updates of `size` coordinates, clipped as `clip_spec` says."""
    return ClippedSum(size, clip_spec, token=_TOKEN)


class ClippedSum:
    """The exact sum of clipped updates: the only thing that `PrivacyPlan.release` takes.

    Made by `PrivacyPlan.new_sum` (or a node's `ClipSpec`), filled by `add`, which clips. A sum counts once:
    `release` empties what it consumes, and an emptied sum refuses all further use.

    Guarantee:
        Adding or removing one device changes the integer vector by a vector of exact L2 norm at most C (2^40
        units), whatever that device computed, and changes nothing else but `num_devices`.
        With an encoder (`fedlm.privacy.noise.skellam_encoding`), each device's clipped integers are encoded before they
        are added, and the sum is modulo 2^m: only encodings are ever held or sent.

    Edge cases:
        | update | contributes | record |
        |---|---|---|
        | NaN or infinity anywhere | zero | finite=False |
        | all zero, denormal | itself, truncated to the unit | clipped=False |
        | norm > C (1 - 2^-20) | scaled to that norm | clipped=True |
        | no clipping, a coordinate beyond 64 in size | zero (it could overflow) | finite=False |

        A zero contribution is encoded too: its device still adds its noise.
    """

    __slots__ = ("_clip_spec", "_fixed", "_num_devices", "_num_reclipped", "_size", "_subtotal", "_vector", "_wide")

    def __init__(self, size: int, clip_spec: ClipSpec, *, token: object = None) -> None:
        """Only `ClipSpec` calls this."""
        if token is not _TOKEN:
            raise TypeError("ClippedSum cannot be built directly; use PrivacyPlan.new_sum(size)")
        self._size = require_count("size", size, low=1)
        if clip_spec.block_scaling and clip_spec.block_scaling.size != size:
            raise ConfigError(
                f"the block scaling covers {clip_spec.block_scaling.size:,} coordinates, the update has {size:,}"
            )
        self._clip_spec = clip_spec
        self._num_devices = self._num_reclipped = 0
        self._vector: IntVector | None = np.zeros(self._width(), np.int64)  # (P + Q,), or (padded,) with an encoder
        chunk = min(len(self._vector), _CHUNK)
        self._wide, self._subtotal = np.empty(chunk, np.float64), np.empty(chunk, np.float64)
        self._fixed = np.empty(chunk, np.int64)

    @property
    def size(self) -> int:
        """Coordinates P of the update."""
        return self._size

    @property
    def clip_spec(self) -> ClipSpec:
        """What every device of this sum was clipped with."""
        return self._clip_spec

    @property
    def clip_norm(self) -> float:
        """C, or infinity without clipping."""
        return self._clip_spec.clip_norm

    @property
    def num_devices(self) -> int:
        """Devices added so far, those that contributed zero included."""
        return self._num_devices

    @property
    def num_reclipped(self) -> int:
        """Devices whose reply arrived longer than the clip norm, and was clipped here."""
        return self._num_reclipped

    def add(self, update: FloatVector, device_stats: DeviceStats = _NO_DEVICE_STATS) -> ClipRecord:
        """Clip one device's whole update and add it.

        Arguments:
            update: (P,) fp32, the device's update before any clipping.
            device_stats: What side queries ask for.

        Returns:
            The norm before the clip, whether it was clipped, whether it was finite.

        Raises:
            DataError: Wrong type, dtype or size.
            ConfigError: More devices than the sum can hold.
        """
        self._require_fp32(update, (self._size,))
        if self._asks_each:
            return self.add_parts([Part(0, update)], device_stats)
        return self.add_many(update[np.newaxis])[0]

    def add_many(self, updates: FloatVector) -> list[ClipRecord]:
        """Clip the whole updates of some devices, each by itself, and add them: the bits of one `add` for each.

        Arguments:
            updates: (G, P) fp32, one device a row, before any clipping.

        Returns:
            For each device what `add` returns.

        Raises:
            DataError: Wrong type, dtype or shape; nothing was added.
            ConfigError: More devices than the sum can hold, or a round with side queries or an encoder, which take each
                device by itself; nothing was added.
        """
        if self._asks_each:
            raise ConfigError(
                "add_many adds plain updates; with block scaling, side queries or encoder, call add for each device"
            )
        self._require_fp32(updates, (len(updates) if np.ndim(updates) else 0, self._size))
        self._live()
        self._reserve(len(updates))
        records: list[ClipRecord] = []
        for start in range(0, len(updates), _BATCH):
            records += self._add_batch(updates[start : start + _BATCH])
        return records

    def add_parts(self, parts: Sequence[Part], device_stats: DeviceStats = _NO_DEVICE_STATS) -> ClipRecord:
        """Clip one device's whole update, given as the parts in which it differs from zero, and add it.

        Arguments:
            parts: In the order of their offsets, without overlap.
            device_stats: What side queries ask for.

        Returns:
            What `add` returns; the norm may differ from that of the whole vector in the last bits of fp64.

        Raises:
            DataError: Wrong types, overlapping parts, parts outside the vector, or a side query that fails on this
                device; nothing was added.
            ConfigError: More devices than the sum can hold; nothing was added.
        """
        total = self._live()
        check_parts(parts, self._size)
        self._reserve(1)
        group_squares = np.zeros(1)
        if self._clip_spec.block_scaling:
            parts, group_squares = self._clip_spec.block_scaling.scaled(parts, self.clip_norm)
        values = [part.values.reshape(-1) for part in parts]
        squares = [square for vector in values for square in self._squares(vector)]
        norm, limit = math.sqrt(math.fsum(squares)), self.clip_norm * (1 - _MARGIN)
        finite, clipped = all(self._fits(vector, norm) for vector in values), norm > limit
        encoder = self._clip_spec.encoder
        # Answers come first: a query of somebody's own may fail, and must not leave half a device behind.
        answers = self._answers(QueryInput(norm, self.clip_norm, group_squares, device_stats)) if finite else []
        fixed = np.zeros(encoder.size, np.int64) if encoder else total  # (P + Q,)
        self._num_devices += 1
        if finite:
            factor = (limit / norm if clipped else 1.0) * self._clip_spec.update_share / self._clip_spec.unit
            for part in parts:
                part.add_to(fixed, (part.values.astype(np.float64) * factor).astype(np.int64))  # truncates toward zero
            for place, units in answers:
                fixed[place] += units
        if encoder:
            self._accept(encoder.encode(fixed, encoder.device_generator(fixed)).view(np.int64))
        return ClipRecord(norm=norm, clipped=finite and clipped, finite=finite)

    def add_arrays(self, vector: IntVector, fields: dict[str, int | float]) -> None:
        """Check a sum that came over the wire and add it.

        The sender says how many devices it holds; a sum of m devices must then have a norm of at most m C. One
        device's reply that is longer is clipped here: the guarantee for a device that trains alone does not rest on
        its own clipping. A longer sum of several is refused, for nobody can tell whose fault it is. Of encoded sums
        nobody can know the norm: that is what the encoding is for. There only range and device count are checked, and
        a device that does not clip spoils the sum unseen.

        Arguments:
            vector: (P + Q,) int64; not kept.
            fields: As `to_arrays` returned them.

        Raises:
            DataError: Dtype, shape, fields, clip norm, device count or norm are not those of an honest sum; nothing
                was added.
            ConfigError: More devices than the sum can hold; nothing was added.
        """
        total = self._live()
        if _require_int64(vector).size != total.size:
            raise DataError(f"sum of size {vector.size:,} does not fit size {total.size:,}; use one update layout")
        num_devices = fields.get("num_devices")
        if set(fields) != {"clip_norm", "num_devices"} or type(num_devices) is not int:
            raise DataError(f"a clipped sum has fields {sorted(fields)}, must have clip_norm and num_devices")
        if fields["clip_norm"] != self.clip_norm:
            raise DataError(f"sum was clipped to {fields['clip_norm']}, this plan clips to {self.clip_norm}")
        if not 0 <= num_devices <= self._clip_spec.capacity:
            raise DataError(f"sum claims {num_devices:,} devices, allowed are 0 to {self._clip_spec.capacity:,}")
        self._reserve(num_devices)
        self._accept(self._within_bound(vector, num_devices))
        self._num_devices += num_devices

    def to_arrays(self) -> tuple[IntVector, dict[str, int | float]]:
        """Return what travels: a read-only view of the vector (P + Q,), and its fields."""
        # Over a read-only buffer: a view of an array that one may write to could be made writeable again.
        view = np.frombuffer(self._live().data.toreadonly(), np.int64)
        return view, {"clip_norm": self.clip_norm, "num_devices": self._num_devices}

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse pickling and copying: a copy could be counted twice, unchecked."""
        raise TypeError("ClippedSum is neither pickled nor copied; send to_arrays() and add it with add_arrays()")

    def _take(self) -> IntVector:
        """Return the vector (P + Q,) and empty the sum; `PrivacyPlan.release` alone calls this."""
        vector = self._live()
        self._vector = None
        return vector

    @property
    def _asks_each(self) -> bool:
        """Whether devices must be added one by one."""
        return bool(self._clip_spec.block_scaling or self._clip_spec.side_queries or self._clip_spec.encoder)

    def _width(self) -> int:
        """Return the coordinates that travel."""
        size, encoder = self._size + self._clip_spec.num_answers, self._clip_spec.encoder
        if encoder and encoder.size != size:
            raise ConfigError(f"the encoder is for {encoder.size:,} coordinates, update and answers have {size:,}")
        return encoder.padded_size if encoder else size

    def _accept(self, addend: IntVector) -> None:
        """Add a checked vector, modulo 2^m with an encoder."""
        total = self._live()
        total += addend
        if self._clip_spec.encoder:
            total &= self._clip_spec.encoder.mask.astype(np.int64)

    def _live(self) -> IntVector:
        if self._vector is None:
            raise BudgetExceededError("this ClippedSum was already released or added to another; start a new sum")
        return self._vector

    def _reserve(self, num_more: int) -> None:
        if self._num_devices + num_more > self._clip_spec.capacity:
            raise ConfigError(
                f"a sum of {self._num_devices + num_more:,} devices could overflow, "
                f"allowed are {self._clip_spec.capacity:,}; use a smaller fleet.cohort"
            )

    def _require_fp32(self, array: FloatVector, shape: tuple[int, ...]) -> None:
        if type(array) is not np.ndarray or array.dtype != np.float32 or array.shape != shape:
            found = f"{getattr(array, 'dtype', type(array).__name__)} {getattr(array, 'shape', '')}".strip()
            wanted = f"({', '.join(map(str, shape))},)" if len(shape) == 1 else f"(devices, {self._size})"
            raise DataError(f"update is {found}, must be a plain float32 array of shape {wanted}")

    def _answers(self, seen: QueryInput) -> list[tuple[slice, IntVector]]:
        """Return where one device's answers to the side queries lie and what they are, each truncated toward zero
        within its share of the clip norm.
        """
        place, found = self._size, list[tuple[slice, IntVector]]()
        for side_query in self._clip_spec.side_queries:
            answer = answer_units(side_query, seen, self.clip_norm)  # (size,)
            units = (answer * ((1 - _MARGIN) / self._clip_spec.unit)).astype(np.int64)
            found.append((slice(place, place + side_query.size), units))
            place += side_query.size
        return found

    def _squares(self, vector: FloatVector | IntVector) -> list[float]:
        """Return the sum of squares of each chunk, in fp64; not finite exactly where the chunk is not."""
        squares = []
        with np.errstate(all="ignore"):
            for start in range(0, vector.size, _CHUNK):
                chunk = vector[start : start + _CHUNK]
                wide = self._wide[: chunk.size]
                np.copyto(wide, chunk)
                squares.append(float(np.dot(wide[:_DOT], wide[:_DOT])) + float(np.dot(wide[_DOT:], wide[_DOT:])))
        return squares

    def _add_batch(self, updates: FloatVector) -> list[ClipRecord]:
        """Clip and add at most `_BATCH` updates (G, P)."""
        limit = self.clip_norm * (1 - _MARGIN)
        records, parts = [], []
        for update in updates:
            squares = self._squares(update)
            norm = math.sqrt(math.fsum(squares))
            finite, clipped = self._fits(update, norm), norm > limit
            records.append(ClipRecord(norm=norm, clipped=finite and clipped, finite=finite))
            if finite:
                parts.append((update, (limit / norm if clipped else 1.0) / self._clip_spec.unit, squares))
        self._accumulate(parts)
        self._num_devices += len(updates)
        return records

    def _fits(self, update: FloatVector, norm: float) -> bool:
        """Return whether the update is finite and, without clipping, small enough never to overflow."""
        if not math.isfinite(norm) or self.clip_norm != math.inf:
            return math.isfinite(norm)
        return not update.size or max(float(update.max()), -float(update.min())) <= _UNCLIPPED_PEAK

    def _accumulate(self, parts: list[tuple[FloatVector, float, list[float]]]) -> None:
        """Add trunc(update * factor) of each `(update, factor, squares)`; chunks that are exactly zero are skipped.

        Chunk by chunk, so that a chunk of the sum is read and written once for all of them.
        """
        total = self._live()
        for index, start in enumerate(range(0, self._size, _CHUNK)):
            size = min(_CHUNK, self._size - start)
            subtotal, wide, fixed = self._subtotal[:size], self._wide[:size], self._fixed[:size]
            is_empty = True
            for update, factor, squares in parts:
                if squares[index] == 0.0:
                    continue
                np.copyto(wide, update[start : start + size])
                np.multiply(wide, factor, out=wide)
                if is_empty:
                    np.trunc(wide, out=subtotal)
                else:
                    np.add(subtotal, np.trunc(wide, out=wide), out=subtotal)
                is_empty = False
            if not is_empty:
                np.copyto(fixed, subtotal, casting="unsafe")
                chunk = total[start : start + size]
                np.add(chunk, fixed, out=chunk)

    def _within_bound(self, vector: IntVector, num_devices: int) -> IntVector:
        """Return a sum that arrived if it is within its bound, and one device's vector clipped to it."""
        if self._clip_spec.encoder:
            self._clip_spec.encoder.check_sum(vector, num_devices)
            return vector
        if self.clip_norm == math.inf:
            size = max(int(vector.max()), -int(vector.min())) / UNITS
            allowed = num_devices * _UNCLIPPED_PEAK
        else:
            size = math.sqrt(math.fsum(self._squares(vector))) * self._clip_spec.unit
            allowed = num_devices * self.clip_norm * (1 - _ARRIVAL_MARGIN)
        if size <= allowed:
            return vector
        if num_devices == 1 and self.clip_norm < math.inf:
            self._num_reclipped += 1
            return (vector * (self.clip_norm * (1 - _MARGIN) / size)).astype(np.int64)  # truncates toward zero
        raise DataError(
            f"sum of {num_devices:,} devices has size {size:.6g}, allowed is {allowed:.6g}; the sender did not clip"
        )


def _require_int64(vector: IntVector) -> IntVector:
    if type(vector) is not np.ndarray or vector.dtype != np.int64 or vector.ndim != 1 or not vector.size:
        raise DataError("a clipped sum must be a non-empty int64 vector; send what ClippedSum.to_arrays returns")
    return vector
