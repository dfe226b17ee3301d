"""What a run keeps secret: cohorts that no message, no published file and no seed tells; a resume has them again."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from tiny_private_runs import TINY, StoppedError, lines, quiet, stop_in

from fedlm.config.load import config_to_toml
from fedlm.config.schema import Config
from fedlm.errors import DataError
from fedlm.privacy.plan import PrivacyPlan
from fedlm.privacy.sampling.cohort_key import CohortKey
from fedlm.randomness import round_key, seed_key
from fedlm.rounding import rounded_up
from server.cohort_key_file import NAME
from server.run_folder import RunFolder
from simulations.grids.inprocess import InProcessGrid
from simulations.run import resume, simulate

Make = Callable[..., Config]
Cohorts = dict[int, set[int]]

SECRET = (*TINY, "privacy.reproducible_cohorts=false", "rounds=3", "fleet.device_log=true")
KEPT = "privacy.keep_cohort_key=true"
OWNERS_ALONE = ("cohort_key", "noise_keys", "devices.csv", "metrics.jsonl", "ledger.jsonl")


def logged(run: Path) -> Cohorts:
    """Return who was sampled in which round, by devices.csv."""
    found: Cohorts = {}
    for line in (run / "devices.csv").read_text().splitlines()[1:]:
        t, device, *_ = line.split(",")
        found.setdefault(int(t), set()).add(int(device))
    return found


def drawn(run: Path, key: CohortKey) -> Cohorts:
    """Return who is sampled under a key by the plan of a run, which is public."""
    plan = PrivacyPlan.from_json((run / "plan.json").read_text(), seed=1, cohort_key=key)
    return {t: set(plan.sample_cohort(t).tolist()) for t in range(1, plan.rounds + 1)}


def guesses(config: Config, sent: Iterable[bytes]) -> Iterator[CohortKey]:
    """Yield the keys that an attacker tries who has the seed, every round's key, and every 32 bytes of the messages."""
    yield CohortKey.reproducible(config.seed)
    yield CohortKey(seed_key(config.seed))
    for t in range(-1, config.rounds + 2):
        yield CohortKey(round_key(config.seed, t))
    yield from map(CohortKey, sent)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """Collect what the server sends to nodes."""
    seen: list[Message] = []
    push = InProcessGrid.push_messages

    def spy(self: InProcessGrid, batch: Iterable[Message]) -> list[str]:
        seen.extend(batch := list(batch))
        return push(self, batch)

    monkeypatch.setattr(InProcessGrid, "push_messages", spy)
    return seen


def decoded(value: bytes | str) -> bytes:
    """Return the bytes that a field of a message stands for: the codec sends them as base64 text."""
    try:
        return value if isinstance(value, bytes) else base64.b64decode(value, validate=True)
    except ValueError:
        return str(value).encode()


def sent_bytes(messages: list[Message]) -> tuple[list[bytes], list[bytes]]:
    """Return everything in the messages, and what of it could be a key."""
    everything, keys = [], []
    for message in messages:
        for record in message.content.config_records.values():
            everything.append(repr(dict(record)).encode())
            values = [decoded(value) for value in record.values() if isinstance(value, bytes | str)]
            everything += values
            keys += [value for value in values if len(value) == 32]
        for arrays in message.content.array_records.values():
            everything += [array.data for array in arrays.values()]
    return everything, keys


def spellings(key: CohortKey) -> list[bytes]:
    text = key.to_text()
    raw = bytes.fromhex(text)
    words = [np.frombuffer(raw, kind)[0] for kind in (np.uint64, np.int64)]
    decimals = [int(text, 16), int.from_bytes(raw, "little"), *map(int, words)]
    return [
        *(raw, raw[::-1], raw[:16], raw[16:], base64.b64encode(raw)[:-2]),
        *(text.encode(), text.upper().encode(), text[:32].encode(), str(raw).encode()[2:-1]),
        *(str(number).encode() for number in decimals),
    ]


def test_neither_messages_nor_published_files_tell_key_or_cohorts(
    small: Make, tmp_path: Path, messages: list[Message]
) -> None:
    run, config = tmp_path / "run", small(*SECRET, KEPT, "trainable.lora.rank=2")
    simulate(config, run, quiet)
    key = CohortKey.from_text((run / NAME).read_text().strip())
    assert drawn(run, key) == logged(run)
    everything, keys = sent_bytes(messages)
    assert any(round_key(config.seed, 1) in data for data in everything)  # it is really the messages
    published = [file for file in run.rglob("*") if file.is_file() and file.name != NAME]
    assert {"report.html", "plan.json", "config.toml", "metrics.jsonl"} < {file.name for file in published}
    for data in (*everything, *(file.read_bytes() for file in published), config_to_toml(config).encode()):
        for spelling in spellings(key):
            assert spelling not in data
    truth = {(t, device) for t, cohort in logged(run).items() for device in cohort}
    for guess in guesses(config, keys):
        found = {(t, device) for t, cohort in drawn(run, guess).items() for device in cohort}
        assert len(found & truth) < 8  # below one by chance, of about 36


def test_the_same_attack_finds_reproducible_cohorts_and_the_stamp_says_so(
    small: Make, tmp_path: Path, messages: list[Message]
) -> None:
    run = tmp_path / "run"
    config = small(*SECRET, "privacy.reproducible_cohorts=true", "privacy.reproducible_noise=false")
    notes: list[object] = []
    summary = simulate(config, run, lambda event: notes.append(event.get("text")))
    assert any(drawn(run, guess) == logged(run) for guess in guesses(config, sent_bytes(messages)[1]))
    assert not (run / NAME).exists()
    plan = PrivacyPlan.from_json((run / "plan.json").read_text(), seed=1, cohort_key=None)
    (stamp,) = plan.guarantee().warnings
    assert plan.epsilon_with_known_cohorts(3) > 3 * plan.epsilon(3)
    assert f"epsilon is {rounded_up(plan.epsilon_with_known_cohorts(3))} at" in stamp
    assert stamp in notes
    assert stamp in summary.privacy_statement
    start, *_, end = lines(run, "ledger.jsonl")
    assert stamp in start["privacy"]["stamps"]
    assert plan.epsilon(3) < end["epsilon_realised"] <= plan.epsilon_with_known_cohorts(3)
    assert "COHORTS NOT SECRET" in (run / "report.html").read_text()


def test_two_runs_of_one_seed_have_different_cohorts(small: Make, tmp_path: Path) -> None:
    for name in ("one", "other"):
        simulate(small(*SECRET, "rounds=1"), tmp_path / name, quiet)
    one, other = (logged(tmp_path / name)[1] for name in ("one", "other"))
    assert len(one & other) < 6 < min(len(one), len(other)) + 3


def test_a_killed_run_resumes_with_its_cohorts(small: Make, tmp_path: Path) -> None:
    """Killed with signal 9 in round 3: the key that it left draws all of its rounds, those before and those after."""
    run = tmp_path / "run"
    (tmp_path / "config.toml").write_text(config_to_toml(small(*SECRET, KEPT)))
    program = (
        "import os, signal, sys; from pathlib import Path; from fedlm.config.load import load_config;"
        "from simulations.run import simulate;"
        "kill = lambda e: os.kill(os.getpid(), signal.SIGKILL) if e.get('round') == 3 else None;"
        "simulate(load_config(Path(sys.argv[1])), Path(sys.argv[2]), kill)"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "config.toml"), str(run)]
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    key, before = (run / NAME).read_text(), logged(run)
    resume(run, quiet)
    assert (run / NAME).read_text() == key
    after = logged(run)
    assert after == drawn(run, CohortKey.from_text(key.strip()))
    assert {t: after[t] for t in (1, 2)} == {t: before[t] for t in (1, 2)}


def test_a_run_without_its_key_goes_on_only_if_it_has_ended(small: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(StoppedError):
        simulate(small(*SECRET), run, stop_in(2))
    shutil.copytree(run, tmp_path / "lost")
    (tmp_path / "lost" / NAME).unlink()
    with pytest.raises(DataError, match=r"cohort_key is missing: .*; restore it"):
        resume(tmp_path / "lost", quiet)
    (tmp_path / "lost" / NAME).write_text("0" * 63)
    with pytest.raises(DataError, match=r"cohort_key is damaged; restore it"):
        resume(tmp_path / "lost", quiet)
    resume(run, quiet)
    assert not (run / NAME).exists()  # nobody needs it any more
    files = {file: file.read_bytes() for file in run.rglob("*") if file.suffix in (".jsonl", ".csv", ".safetensors")}
    resume(run, quiet)  # writes the report again
    assert {file: file.read_bytes() for file in files} == files


@pytest.mark.parametrize("mechanism", ["gaussian", "blt"])
def test_a_run_that_dies_at_its_end_keeps_what_it_needs_and_then_forgets(
    small: Make, tmp_path: Path, mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its last ledger line it still has its keys; after it, a resume does no more than delete them."""
    append, run = RunFolder.ledger, tmp_path / "run"

    def die(self: RunFolder, line: Any) -> None:
        if line["event"] == "end":
            raise StoppedError
        append(self, line)

    top = "trainable.embedding_rows.sampler=top_k"
    config = small(*SECRET, top, f"privacy.mechanism={mechanism}")
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "ledger", die)
        with pytest.raises(StoppedError):
            simulate(config, run, quiet)
    kept = {name: (run / name).read_bytes() for name in (NAME, "noise_keys") if (run / name).exists()}
    assert len(kept) == (2 if mechanism == "blt" else 1)
    resume(run, quiet)
    assert lines(run, "ledger.jsonl")[-1]["status"] == "finished"
    for name, data in kept.items():
        assert not (run / name).exists()
        (run / name).write_bytes(data)  # as if it had died right after that line
    resume(run, quiet)
    assert not any((run / name).exists() for name in kept)


def test_audits_keep_the_key(small: Make, tmp_path: Path) -> None:
    simulate(small(*SECRET, "rounds=1", "audit.canaries=5"), tmp_path / "run", quiet)
    assert drawn(tmp_path / "run", CohortKey.from_text((tmp_path / "run" / NAME).read_text().strip()))[1]


@pytest.mark.parametrize("there_before", [False, True])
def test_a_run_folder_is_its_owners_and_what_is_secret_is_so_by_itself(
    small: Make, tmp_path: Path, there_before: bool
) -> None:
    run = tmp_path / "run"
    if there_before:
        run.mkdir(mode=0o755)
    config = small(*SECRET, "trainable.embedding_rows.sampler=top_k", "privacy.mechanism=blt")
    old = os.umask(0o022)
    try:
        with pytest.raises(StoppedError):
            simulate(config, run, stop_in(3))
        broken = modes(run)
        resume(run, quiet)
    finally:
        os.umask(old)
    assert {"cohort_key", "noise_keys"} <= broken.keys()
    for found in (broken, modes(run)):
        assert found["."] == 0o700
        for name, mode in found.items():
            if name in OWNERS_ALONE or name.startswith("journal/"):
                assert mode == 0o600, name
            elif (run / name).is_file():
                assert mode == 0o644 or name.startswith("adapter"), name
    assert {"report.html", "journal/round_000003.safetensors", "devices.csv", "plan.json"} <= modes(run).keys()


def modes(run: Path) -> dict[str, int]:
    return {str(file.relative_to(run)): file.stat().st_mode & 0o777 for file in (run, *run.rglob("*"))}
