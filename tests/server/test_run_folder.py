"""What survives in a run folder: journal and checkpoints overlap, torn lines are dropped, writes are all or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedlm.errors import OutputError
from server.run_folder import CONFIG, PLAN, RunFolder, write_atomically


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", {CONFIG: "seed = 1\n", PLAN: "{}"}, bytes_needed=1000)


def test_every_round_can_be_rebuilt_at_any_time(folder: RunFolder) -> None:
    """After each write, the newest checkpoint and the journal together cover all rounds so far, without a gap."""
    for t in range(1, 24):
        folder.write_release(t, {"mean": np.full(3, t, np.float32)}, {"metrics": {"round": t}, "ledger": []})
        if t % 5 == 0:
            folder.write_checkpoint(t, {"values": np.full(3, t, np.float32)}, {"num_steps": t})
        start, _, meta = folder.last_checkpoint() or (0, {}, {"num_steps": 0})
        assert meta["num_steps"] == start
        rounds = [number for number, arrays in folder.releases(after=start) if arrays["mean"][0] == number]
        assert rounds == list(range(start + 1, t + 1))
        assert folder.release_record(t)["metrics"]["round"] == t, "also of the round that was just checkpointed"
    assert len(list((folder.path / "checkpoints").iterdir())) == 4, "two checkpoints, two files each"
    assert len(list((folder.path / "journal").iterdir())) == 23 - 15


def test_a_checkpoint_without_its_meta_file_does_not_count(folder: RunFolder) -> None:
    folder.write_checkpoint(1, {"values": np.zeros(3, np.float32)}, {"num_steps": 1})
    (folder.path / "checkpoints" / "round_000002.safetensors").write_bytes(b"half")
    found = folder.last_checkpoint()
    assert found is not None
    assert found[0] == 1


def test_rewind_drops_later_rounds_and_torn_lines(folder: RunFolder) -> None:
    folder.ledger({"event": "start"})
    for t in range(4):
        folder.metric({"round": t})
        folder.ledger({"event": "round", "round": t})
    with (folder.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"round": 4, "perple')
    assert [line["round"] for line in folder.rewind(2)] == [0, 1, 2]
    assert [line.get("round") for line in folder.lines("ledger.jsonl")] == [None, 0, 1, 2]
    with pytest.raises(ValueError, match="Out of range"):
        folder.metric({"round": 5, "perplexity": float("nan")})
    json.loads((folder.path / "metrics.jsonl").read_text().splitlines()[-1])


def test_text_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    """A real process in the C locale, where Python would take ASCII: what it writes this one reads, and back."""
    program = (
        "import sys; from pathlib import Path; from server.run_folder import CONFIG, PLAN, RunFolder;"
        "path = Path(sys.argv[1]); texts = {CONFIG: 'corpus = \\u00fc\\u8a9e', PLAN: '{}'};"
        "folder = RunFolder.create(path, texts, bytes_needed=0); folder.ledger({'cause': '\\u00fc'});"
        "assert folder.text(CONFIG) == texts[CONFIG]; folder.write_checkpoint(1, {}, {'corpus': '\\u00fc'});"
        "assert folder.last_checkpoint()[2] == {'corpus': '\\u00fc'}; assert folder.rewind(1) == []"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-c", program, str(tmp_path / "run")]
    subprocess.run(words, env={**os.environ, **ascii_only}, check=True, timeout=60)
    assert RunFolder.open(tmp_path / "run").text(CONFIG) == "corpus = \u00fc\u8a9e"


def test_a_write_that_does_not_fit_leaves_the_old_file(tmp_path: Path) -> None:
    """A real process that may write no more than 4 kB: the old content stays, nothing half-written remains."""
    target = tmp_path / "state"
    write_atomically(target, b"old")
    program = (
        "import resource, signal, sys; from pathlib import Path; from server.run_folder import write_atomically;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "write_atomically(Path(sys.argv[1]), bytes(100_000))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(target)], capture_output=True, text=True, timeout=60)
    assert "OSError" in done.stderr
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_disk_that_is_too_small_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="MB free, but checkpoints need"):
        RunFolder.create(tmp_path / "run", {CONFIG: "", PLAN: ""}, bytes_needed=10**18)
