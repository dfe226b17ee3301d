"""Ray's life in this process: started or joined in the background, and ended with every process of it.

Ray is imported in a thread, and only when a session is opened: importing and starting it takes some seconds.
The thread stays until the session is closed, because Linux kills Ray's servers when the thread that started them
ends; so they do not outlive this process either, however it ends (their two small agents follow in a minute).
"""

from __future__ import annotations

import atexit
import importlib
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from fedlm.errors import ConfigError, WorkerError
from simulations.grids.node import one_line

T = TypeVar("T")
Note = Callable[[str], None]

NOTE_EVERY_S = 10.0
"""How often somebody who waits for a start is told what for."""

EXIT_TIMEOUT_S = 10.0
"""Longest wait for Ray's processes to end by themselves before they are killed."""

_MIN_STORE_BYTES = 128 * 2**20  # Ray refuses less than 75 MiB
_WORKING_STORE_BYTES = 2**30

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # glibc gives large temporaries back to the system at once; the next batch pays for them in page faults
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
    "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30),
}

NICENESS = "RAY_worker_niceness"
"""Ray's own variable; a worker adds it to the priority that it inherits when it starts, 15 if nobody says otherwise."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # Ray would report lost workers on stdout, which is for results
}

_QUIET_LOCAL = {
    "RAY_enable_metrics_collection": "0",  # saves most of a second at the start
    "RAY_prestart_worker_first_driver": "0",  # those would lack the workers' environment
    # Ray's ports run any code that is sent to them: stay on the loopback interface, as on Windows and macOS
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


class Wait:
    """A wait with a deadline that tells, now and then, what it is for.

    Arguments:
        what: For example "Ray on this machine".
        since: When it began, in monotonic seconds.
        limit_s: `execution.start_timeout_s`.
        note: Receives lines such as "waiting for worker 2 of 2 to start, 35 s".
    """

    def __init__(self, what: str, *, since: float, limit_s: float, note: Note) -> None:
        self._what, self._since, self._limit_s, self._note = what, since, limit_s, note

    def slices(self) -> Iterator[float]:
        """Yield the seconds to wait at a time; the last, at the deadline or after it, is 0."""
        noted = time.monotonic()
        while (left := self._since + self._limit_s - time.monotonic()) > 0:
            yield min(left, NOTE_EVERY_S)
            if (waited := time.monotonic()) - noted >= NOTE_EVERY_S * 0.9:
                noted = waited
                self._note(f"waiting for {self._what} to start, {waited - self._since:.0f} s")
        yield 0.0

    def failure(self) -> WorkerError:
        """Return what to raise when it was in vain: the limit, the likely cause and the fix."""
        return WorkerError(
            f"{self._what} did not start within execution.start_timeout_s = {self._limit_s:g} s; is the machine busy "
            f"with other work, or {NICENESS} set above 0? Raise the limit, end other work, take fewer "
            "execution.workers, or set execution.grid = 'inprocess'"
        )


def available_cores() -> int:
    """Return the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def store_capacity(shared_bytes: int) -> int:
    """Return the size in bytes of the object store of a Ray that is started here.

    Room for the shared arrays and for messages in flight, but at most 80 % of the shared memory that is free.
    """
    folder = Path("/dev/shm")
    free = shutil.disk_usage(folder if folder.is_dir() else Path.home()).free
    return max(_MIN_STORE_BYTES, min(2 * shared_bytes + _WORKING_STORE_BYTES, int(0.8 * free)))


def worker_niceness() -> dict[str, str]:
    """Return the variable that gives workers the priority of what starts them, unless the user has set another."""
    return {NICENESS: os.environ.get(NICENESS, "0")}


class RaySession(Generic[T]):
    """Starts Ray on this machine, or joins a cluster, in a thread of its own.

    Arguments:
        address: Of a running cluster; empty starts Ray here with `available_cores()` CPUs. A Ray that this
            process has joined already is used as it is, and left running.
        store_bytes: Object store of a Ray that is started here.
        start_timeout_s: Longest wait for Ray to be there.
        note: Told, now and then, what is being waited for.
        on_connect: Runs in the thread once Ray is there; receives the ray module, and `wait` returns its result.
    """

    def __init__(
        self,
        *,
        address: str,
        store_bytes: int,
        start_timeout_s: float = 600.0,
        note: Note = lambda text: None,
        on_connect: Callable[[Any], T],
    ) -> None:
        self.ray: Any = None
        self._start_timeout_s = start_timeout_s
        where = f"Ray on the cluster at {address!r}" if address else "Ray on this machine"
        self._wait = Wait(where, since=time.monotonic(), limit_s=start_timeout_s, note=note)
        self._where = where
        self._address = address
        self._store_bytes = store_bytes
        self._on_connect = on_connect
        self._joined = False  # by us: to be left at the end
        self._folder = ""  # of the processes that we started
        self._result: T
        self._failure: BaseException | None = None
        self._connected = threading.Event()
        self._release = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ray-session", daemon=True)
        self._thread.start()

    def wait(self) -> T:
        """Wait until Ray is there and return what `on_connect` returned.

        Raises:
            WorkerError: It failed, or took longer than `start_timeout_s`.
            ConfigError: From `on_connect`.
        """
        if self._closed:
            raise WorkerError("the grid is closed; open a new one")
        if not any(self._connected.wait(seconds) for seconds in self._wait.slices()):
            raise self._wait.failure()
        if isinstance(self._failure, ConfigError):
            raise self._failure
        if self._failure is not None:
            raise WorkerError(f"{self._where}: {one_line(self._failure)}") from self._failure
        return self._result

    def settle(self) -> T | None:
        """Wait until Ray is there or has failed, not for long; return what `on_connect` returned if Ray can be used."""
        there = self._connected.wait(EXIT_TIMEOUT_S) and self.ray is not None and self.ray.is_initialized()
        usable = there and not self._closed and self._failure is None
        return self._result if usable else None

    def close(self) -> None:
        """Leave Ray; if it was started here, end it and wait until every process of it is gone."""
        if self._closed:
            return
        self.settle()
        self._closed = True
        atexit.unregister(self.close)
        processes = _ray_processes(self._folder) if self._folder else {}
        if self._joined:
            self.ray.shutdown()
        self._release.set()
        self._thread.join(EXIT_TIMEOUT_S)
        _await_exit(processes)

    def _run(self) -> None:
        try:
            self._connect()
            if self._closed:  # nobody has waited until now
                self.ray.shutdown()
                return
            self._result = self._on_connect(self.ray)
        except BaseException as error:  # raised again in wait(), by the thread that wants to know
            self._failure = error
        self._connected.set()
        self._release.wait()

    def _connect(self) -> None:
        for name, value in {**QUIET, **({} if self._address else self._local_environment())}.items():
            os.environ.setdefault(name, value)
        self.ray = importlib.import_module("ray")
        atexit.register(self.close)  # after Ray's own hook, so it runs before it
        if self.ray.is_initialized():
            return
        options: dict[str, Any] = {"address": self._address} if self._address else self._local_options()
        context = self.ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            **options,
        )
        self._joined = True
        if not self._address:
            self._folder = context.address_info["session_dir"]

    def _local_environment(self) -> dict[str, str]:
        """Return the settings of the processes that are started here; on a loaded machine Ray's own limits are short.

        A worker that has not registered in time is killed and started again, which takes as long the second time.
        """
        limit = str(math.ceil(self._start_timeout_s))
        limits = {"RAY_worker_register_timeout_seconds": limit, "RAY_raylet_start_wait_time_s": limit}
        return {**_QUIET_LOCAL, **worker_niceness(), **limits}

    def _local_options(self) -> dict[str, Any]:
        return {
            "address": "local",
            "num_cpus": available_cores(),
            "num_gpus": 0,
            "include_dashboard": False,
            "object_store_memory": self._store_bytes,
        }


def _ray_processes(session_folder: str) -> dict[int, str]:
    """Return pid and start time of this process's children that name the folder, and of their descendants.

    Workers do not name it, but they are children of the raylet, which does.
    """
    stats = _process_table()
    found: dict[int, str] = {}
    children = {pid for pid, (parent, _) in stats.items() if parent == os.getpid()}
    parents = {pid for pid in children if session_folder in _command(pid)}
    while parents:
        found.update({pid: stats[pid][1] for pid in parents})
        parents = {pid for pid, (parent, _) in stats.items() if parent in parents}
    return found


def _process_table() -> dict[int, tuple[int, str]]:
    """Return parent and start time of every process; empty where the system has no /proc."""
    table = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if fields[0] != "Z":
            table[int(stat.parent.name)] = (int(fields[1]), fields[19])
    return table


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _await_exit(processes: dict[int, str]) -> None:
    """Wait until these processes are gone; after `EXIT_TIMEOUT_S` kill those that are left."""
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    left = processes
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        table = _process_table()
        left = {pid: born for pid, born in left.items() if table.get(pid, (0, ""))[1] == born}
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
