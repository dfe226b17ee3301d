"""What a long verb shows on standard error while it works: a bar on a terminal, else a line now and then.

Both are listeners: functions of one event, a dictionary with the key `event`.

    stage        text                                            a line
    pretrain     step, steps, loss                               the bar
    finetune     step, steps, non_private_loss, epsilon, stamps, examples_per_second    the bar
    device_done  round, done, total                              the bar
    round        round, rounds, perplexity, epsilon, stamps, devices_per_second, megabytes    the bar
    note         text                                            a warning, shown once and never suppressed

Other events are for other listeners.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from fedlm.rounding import rounded_up, stamped

if TYPE_CHECKING:
    from rich.progress import Progress

Listener = Callable[[dict[str, object]], None]
_Event = Mapping[str, Any]
_DEFAULT_HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@contextmanager
def progress(*, quiet: bool, json: bool) -> Iterator[Listener]:
    """Give the listener of one verb; meanwhile what libraries print goes to standard error.

    SIGTERM, which is how schedulers and service managers end a program, does what Ctrl-C does. An interrupt that Python
    has swallowed, for it came inside a weak reference's callback, is raised again at the end of the round or step.

    Arguments:
        quiet: Only warnings are shown.
        json: Somebody parses the output: only warnings are shown unless standard error is a terminal.
    """
    with _noted_interrupts() as noted, _shown(quiet=quiet, json=json) as show:
        yield _raising(show, noted)


@contextmanager
def interruptible(listener: Listener) -> Iterator[Listener]:
    """Give a listener that passes events on; meanwhile interrupts are those of `progress`."""
    with _noted_interrupts() as noted:
        yield _raising(listener, noted)


def _raising(listener: Listener, noted: list[int]) -> Listener:
    """Return the listener of a verb that an interrupt ends at the end of the round or step at the latest."""

    def listen(event: dict[str, object]) -> None:
        listener(event)
        if noted and event["event"] in ("round", "finetune"):
            raise KeyboardInterrupt

    return listen


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt, and note that one came; both are as before afterwards.

    Python delivers signals to its main thread alone; in another one nothing changes.
    """
    noted: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in _DEFAULT_HANDLERS}
    is_main = threading.current_thread() is threading.main_thread()
    ours = [n for n, default in _DEFAULT_HANDLERS.items() if is_main and before[n] is default]  # else somebody's
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield noted
    finally:
        for number in ours:
            signal.signal(number, before[number])


@contextmanager
def _shown(*, quiet: bool, json: bool) -> Iterator[Listener]:
    terminal = sys.stderr.isatty()
    if quiet or (json and not terminal):
        with redirect_stdout(sys.stderr):
            yield Lines(_write_line, every_s=float("inf"), stages=False)
    elif not terminal:
        with redirect_stdout(sys.stderr):
            yield Lines(_write_line)
    else:
        with _bar() as bar, redirect_stdout(sys.stderr):
            yield ProgressBar(bar)


def sentence(event: _Event) -> str:
    """Return an event as one line of text; figures that are None or absent are left out.

    >>> sentence({"event": "round", "round": 3, "rounds": 30, "perplexity": None, "epsilon": 0.417, "stamps": []})
    'round 3/30  epsilon 0.417'
    """
    match event["event"]:
        case "pretrain":
            return f"pretraining  step {event['step']}/{event['steps']}  loss {event['loss']:.3f}"
        case "finetune":
            figures = [
                ("non-private loss {:.3f}", event.get("non_private_loss")),
                ("{}", _epsilon(event)),
                ("{:.1f} examples/s", event.get("examples_per_second")),
            ]
            known = [form.format(value) for form, value in figures if value is not None]
            return "  ".join([f"step {event['step']}/{event['steps']}", *known])
        case "device_done":
            return f"round {event['round']}  device {event['done']}/{event['total']}"
        case "round":
            figures = [
                ("perplexity {:.1f}", event.get("perplexity")),
                ("{}", _epsilon(event)),
                ("{:.1f} devices/s", event.get("devices_per_second")),
                ("{:.1f} MB", event.get("megabytes")),
            ]
            known = [form.format(value) for form, value in figures if value is not None]
            return "  ".join([f"round {event['round']}/{event['rounds']}", *known])
        case "note":
            return f"warning: {event['text']}"
        case _:
            return str(event.get("text", ""))


def _epsilon(event: _Event) -> str | None:
    """Return what was spent, with the verdicts of its stamps."""
    if event.get("epsilon") is None:
        return None
    return stamped(f"epsilon {rounded_up(event['epsilon'])}", event["stamps"])


class Lines:
    """A listener that prints stages and warnings at once, and progress at most every few seconds.

    Arguments:
        write: Prints one line.
        every_s: Least seconds between two lines of progress; the last round and the last step always show.
        stages: False: only warnings.
        clock: Seconds from any start.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        every_s: float = 5.0,
        stages: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._every_s, self._stages, self._clock = write, every_s, stages, clock
        self._last = -float("inf")
        self._seen: set[str] = set()

    def __call__(self, event: dict[str, object]) -> None:
        text = sentence(event)
        match event["event"]:
            case "note" if text not in self._seen:
                self._seen.add(text)
                self._write(text)
            case "stage" if self._stages:
                self._write(text)
            case "pretrain" | "finetune" | "round" | "device_done" if self._stages and self._due(event):
                self._last = self._clock()
                self._write(text)

    def _due(self, event: _Event) -> bool:
        ended = event["event"] != "device_done" and _done(event) == _total(event)
        return ended or self._clock() - self._last >= self._every_s


class ProgressBar:
    """A listener that moves one rich progress bar; stages and warnings are printed above it."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None)
        self._lines = Lines(lambda text: bar.console.print(text, markup=False, highlight=False), every_s=float("inf"))
        self._rounds: float | None = None  # known from the first round event on

    def __call__(self, event: dict[str, object]) -> None:
        text = sentence(event)
        match event["event"]:
            case "pretrain" | "finetune":
                self._bar.update(self._task, total=_total(event), completed=_done(event), description=text)
            case "round":
                self._rounds = _total(event)
                self._bar.update(self._task, total=self._rounds, completed=_done(event), description=text)
            case "device_done" if self._rounds is not None:
                # The description stays that of the last round: its figures change once a round.
                self._bar.update(self._task, total=self._rounds, completed=_done(event))
            case "device_done":
                self._bar.update(self._task, total=None, description=text)
            case _:
                self._lines(event)


def _done(event: _Event) -> float:
    if event["event"] == "device_done":
        return float(event["round"] - 1 + event["done"] / max(event["total"], 1))
    return float(event["step" if "step" in event else "round"])


def _total(event: _Event) -> float:
    return float(event["steps" if "steps" in event else "rounds"])


def _write_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        BarColumn(bar_width=24),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
