"""The built-in profiles, in the format of a profile file: copy one to a file and edit it.

The figures of "phones" are round assumptions of ours, not a measurement: three classes of phone, of which an app may
use a sixth of the RAM; speed is what training in fp32 reaches, far below the chip's peak; a phone takes part while it
is idle, charging and on an unmetered network, which is mostly at night, over four time zones.
"""

from __future__ import annotations

UNIFORM = "class\nany\n"

_NIGHTS = (
    0.60, 0.65, 0.65, 0.65, 0.60, 0.50, 0.35, 0.20, 0.12, 0.10, 0.08, 0.08,
    0.10, 0.08, 0.08, 0.08, 0.08, 0.10, 0.12, 0.15, 0.20, 0.30, 0.40, 0.50,
)  # fmt: skip
_ZONES = "-8 -7 -6 -5"
_PHONES = (
    # class, share, memory_mb, gflops, down_mbit, up_mbit, dropout
    ("low", 0.25, 512, 10, 10, 3, 0.12),  # 3 GB of RAM
    ("mid", 0.50, 1024, 30, 30, 10, 0.08),  # 6 GB
    ("high", 0.25, 2048, 80, 100, 30, 0.05),  # 12 GB
)


def _phones() -> str:
    hours = [f"h{hour:02d}" for hour in range(24)]
    names = ["class", "share", "memory_mb", "gflops", "down_mbit", "up_mbit", "dropout", "spread", "utc_offsets_h"]
    rows = [[*map(str, phone), "0.3", _ZONES, *map(str, _NIGHTS)] for phone in _PHONES]
    return "".join(",".join(row) + "\n" for row in [[*names, *hours], *rows])


MIXES = {"uniform": UNIFORM, "phones": _phones()}
