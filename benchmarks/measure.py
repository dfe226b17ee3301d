"""What every benchmark records beside its figures: memory of a process as Linux counts it, the date, the machine."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path


def status_mb(field: str, pid: int | str = "self") -> float:
    """Return a memory field of /proc/PID/status in MB (1e6 bytes).

    Arguments:
        field: "VmHWM" (peak resident memory), "VmRSS", "RssAnon", "RssFile".
        pid: The process.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ProcessLookupError(f"process {pid} has no {field}: it has ended")


def reset_peak() -> None:
    """Let VmHWM of this process start again from its memory now."""
    Path("/proc/self/clear_refs").write_text("5")


def machine() -> str:
    """Return one line: date, processor, cores, memory, system, load before the measurement."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cores = len(os.sched_getaffinity(0))
    return (
        f"{time.strftime('%Y-%m-%d')}, {model}, {cores} cores, {memory_gb:.0f} GB, "
        f"{platform.system()} {platform.machine()}, load {os.getloadavg()[0]:.1f}"
    )
