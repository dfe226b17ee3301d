"""What `fedlm doctor` looks at: each check finds one fact of this machine, whether it will do, and the fix.

A missing package is a finding, so a check imports what it needs itself.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fedlm.cli.distribution import requirements
from fedlm.environment import QUIET_ENVIRONMENT

_LEAST_MEMORY_MB = 2_000
_LEAST_DISK_MB = 2_000


@dataclass(frozen=True)
class Check:
    """One line of `fedlm doctor`.

    Arguments:
        name: What was looked at.
        ok: Whether it will do.
        found: What was found.
        fix: What to do if it would not do.
    """

    name: str
    ok: bool
    found: str
    fix: str = ""


def check_machine(*, start_ray: bool) -> list[Check]:
    """Return every check of this machine.

    Arguments:
        start_ray: Also start a Ray worker and stop it again.
    """
    parts: list[Callable[[], Iterable[Check]]] = [_versions, _processor, _memory, _folders, _environment]
    if start_ray:
        parts.append(_ray)
    return [check for part in parts for check in _run(part)]


def _run(part: Callable[[], Iterable[Check]]) -> list[Check]:
    try:
        return list(part())
    except ModuleNotFoundError as error:
        name = part.__name__.strip("_")
        return [Check(name, False, f"not looked at: {error.name} is not installed", f"pip install {error.name}")]


def _versions() -> Iterator[Check]:
    from packaging.requirements import Requirement

    python = ".".join(map(str, sys.version_info[:3]))
    yield Check("python", sys.version_info >= (3, 11), python, "install Python 3.11 or later")
    for requirement in map(Requirement, requirements()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        fix = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Check(requirement.name, False, "not installed", fix)
        else:
            yield Check(requirement.name, found in requirement.specifier, found, fix)


def _processor() -> Iterator[Check]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{cores} cores, {capability}{', bf16' if _has_bf16() else ''}"
    yield Check("processor", capability not in ("DEFAULT", "NO AVX"), found, "training will be slow: no vector unit")


def _has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:  # not Linux
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def _memory() -> Iterator[Check]:
    available_mb = _available_memory_mb()
    if available_mb is None:
        yield Check("memory", True, "unknown on this system")
        return
    fix = f"close other programs; {_LEAST_MEMORY_MB} MB is the least for the default job"
    yield Check("memory", available_mb >= _LEAST_MEMORY_MB, f"{available_mb} MB available", fix)


def _available_memory_mb() -> int | None:
    """Return what this process may still take: what the system has, or what its control group leaves."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    system = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    if system is None:
        return None
    group = Path("/sys/fs/cgroup")
    try:
        left = _number_in(group / "memory.max") - _number_in(group / "memory.current")
    except (OSError, ValueError):  # no control group, or no limit ("max")
        left = system
    return min(system, left) // 10**6


def _number_in(file: Path) -> int:
    return int(file.read_text(encoding="utf-8"))


def _folders() -> Iterator[Check]:
    yield _writable("current folder", Path.cwd())
    from platformdirs import user_cache_path

    cache = user_cache_path("fedlm")
    yield _writable("cache folder", cache)
    yield _disk(cache)


def _disk(folder: Path) -> Check:
    free_mb = shutil.disk_usage(_existing(folder)).free // 10**6
    fix = f"free some; {_LEAST_DISK_MB} MB is the least, or set data.cache_dir to another disk"
    return Check("disk of the cache", free_mb >= _LEAST_DISK_MB, f"{free_mb} MB free for {folder}", fix)


def _writable(name: str, folder: Path) -> Check:
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return Check(name, True, f"{folder} is writable")
    except OSError as error:
        return Check(name, False, f"{folder}: {error.strerror}", "give write permission, or choose another folder")


def _existing(folder: Path) -> Path:
    """Return the folder or its nearest parent that exists: it is where the folder would be made."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _environment() -> Iterator[Check]:
    for name, quiet in QUIET_ENVIRONMENT.items():
        value = os.environ.get(name, "")
        yield Check(name, value == quiet, value or "not set", f"unset it: {quiet} keeps runs offline and quiet")


def _ray() -> Iterator[Check]:
    import ray

    def worker_process() -> int:
        return os.getpid()

    try:
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
        try:
            process = ray.get(ray.remote(worker_process).remote(), timeout=60)
        finally:
            ray.shutdown()
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        found = f"does not start: {' '.join(str(error).split())}"
        yield Check("ray worker", False, found, "set execution.grid = 'inprocess'")
    else:
        yield Check("ray worker", True, f"ran as process {process}")
