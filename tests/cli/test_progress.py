"""Progress: what is printed when, with a clock of our own; and that nothing leaks into standard output."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedlm.cli.output import print_json, print_pairs, print_table
from fedlm.cli.progress import Lines, progress, sentence

ROOT = Path(__file__).resolve().parents[2]

ROUND = {
    "event": "round",
    "round": 2,
    "rounds": 30,
    "perplexity": 412.26,
    "epsilon": 0.5,
    "stamps": [],
    "devices_per_second": 51.0,
    "megabytes": 3.25,
}


def test_lines_come_at_most_every_few_seconds_but_the_last_always() -> None:
    now = 0.0
    printed: list[str] = []
    lines = Lines(printed.append, every_s=5.0, clock=lambda: now)
    for number in range(31):
        now = number * 1.0
        lines({**ROUND, "round": number, "perplexity": None})
    assert [int(line.split()[1].split("/")[0]) for line in printed] == [0, 5, 10, 15, 20, 25, 30]
    now = 30.5
    lines({"event": "stage", "text": "writing"})
    lines({"event": "pretrain", "step": 9, "steps": 10, "loss": 5.0})
    lines({"event": "pretrain", "step": 10, "steps": 10, "loss": 4.5})
    lines({"event": "device_done", "round": 1, "done": 10, "total": 10})
    assert printed[7:] == ["writing", "pretraining  step 10/10  loss 4.500"]


def test_a_warning_shows_once_even_when_all_else_is_quiet() -> None:
    printed: list[str] = []
    lines = Lines(printed.append, every_s=math.inf, stages=False)
    for _ in range(3):
        lines({"event": "note", "text": "NOT PRIVATE"})
        lines({"event": "stage", "text": "training"})
        lines({**ROUND, "round": 30})
        lines({"event": "of another listener"})
    assert printed == ["warning: NOT PRIVATE"]


def test_a_round_in_words() -> None:
    assert sentence(ROUND) == "round 2/30  perplexity 412.3  epsilon 0.5  51.0 devices/s  3.2 MB"


def test_epsilon_has_its_stamps_beside_it_while_work_goes_on() -> None:
    stamps = ["NOT PRIVATE: who knows the seed", "no guarantee for this model: epsilon 2 is that of others"]
    assert "epsilon 0.5 [NOT PRIVATE; no guarantee for this model]" in sentence({**ROUND, "stamps": stamps})
    step = {"event": "finetune", "step": 1, "steps": 2, "epsilon": 0.5, "stamps": stamps}
    assert sentence(step) == "step 1/2  epsilon 0.5 [NOT PRIVATE; no guarantee for this model]"
    for event in (ROUND, step):
        with pytest.raises(KeyError):  # nobody can leave them out
            sentence({name: value for name, value in event.items() if name != "stamps"})


@pytest.mark.parametrize(("quiet", "as_json"), [(False, False), (True, False), (False, True)])
def test_standard_output_belongs_to_the_result(quiet: bool, as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=quiet, json=as_json) as listener:
        listener({"event": "stage", "text": "parsing"})
        print("a library talks")
    out, error = capsys.readouterr()
    assert out == ""
    assert ("parsing" in error) == (not quiet and not as_json)
    assert "a library talks" in error


def test_json_is_one_strict_object() -> None:
    out = io.StringIO()
    stdout, sys.stdout = sys.stdout, out
    try:
        print_json({"epsilon": math.inf, "rows": [{"x": math.nan}], "run_dir": Path("a"), "ok": True, "n": None})
    finally:
        sys.stdout = stdout
    value = json.loads(out.getvalue(), parse_constant=pytest.fail)
    assert value == {"epsilon": None, "rows": [{"x": None}], "run_dir": "a", "ok": True, "n": None}


def test_tables_keep_paths_whole_and_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/runs/" + "x" * 300
    print_pairs([("run", path), ("perplexity", "1 → 2")])
    print_table(("key", "value"), [("[bold]", "[red]")])
    out = capsys.readouterr().out
    assert path in out
    assert "perplexity  1 → 2" in out
    assert "[bold]" in out
    assert "[red]" in out


def test_on_a_terminal_there_is_a_bar_and_standard_output_stays_clean() -> None:
    code = (
        "from fedlm.cli.progress import progress\n"
        "with progress(quiet=False, json=True) as listener:\n"
        "    listener({'event': 'device_done', 'round': 1, 'done': 1, 'total': 2})\n"
        "    listener({'event': 'note', 'text': 'take [care]'})\n"
        f"    listener({ {**ROUND, 'round': 29}!r})\n"
        "    listener({'event': 'device_done', 'round': 30, 'done': 2, 'total': 2})\n"
        "print('result')\n"
    )
    terminal, end = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=end,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
            timeout=60,
            check=True,
        )
        os.close(end)
        shown = _read_all(terminal)
    finally:
        os.close(terminal)
    assert done.stdout == b"result\n"
    assert "warning: take [care]" in shown
    assert "round 29/30  perplexity 412.3" in shown


def _read_all(terminal: int) -> str:
    parts = []
    try:
        while part := os.read(terminal, 65536):
            parts.append(part)
    except OSError:  # Linux says EIO when the other end has closed
        pass
    return b"".join(parts).decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_was_swallowed_is_raised_at_the_end_of_the_round(number: signal.Signals) -> None:
    event: dict[str, object] = {"event": "round", "round": 1, "rounds": 2}
    with progress(quiet=True, json=False) as listener:
        listener(event)
        with contextlib.suppress(KeyboardInterrupt):  # as in a weak reference's callback
            signal.raise_signal(number)
        listener({"event": "device_done", "round": 2, "done": 1, "total": 2})
        with pytest.raises(KeyboardInterrupt):
            listener(event)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
