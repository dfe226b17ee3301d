"""A disk that is full or read-only, at the start and in the middle: one line, nothing lost, resume works."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_fedlm import Fedlm, one_line

Mount = Callable[[str], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Mount]:
    """Mount a small disk at disk/, or change the mounted one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        words = ["mount", "-t", "tmpfs", "-o", f"remount,{options}" if mounted else options, "tmpfs", str(folder)]
        if not sys.platform.startswith("linux") or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs Linux and the rights to mount")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_too_small_for_the_run_is_refused_at_once(fedlm: Fedlm, disk: Mount, tiny: Path) -> None:
    folder = disk("size=100k")
    one_line(fedlm("simulate", tiny, "--out", folder / "run", "--quiet"), 1, "0 MB free", "free some space")
    assert list(folder.iterdir()) == []


def test_a_full_cache_is_one_line(fedlm: Fedlm, disk: Mount, tiny: Path) -> None:
    folder = disk("size=300k")  # not enough for the corpus
    words = ["simulate", tiny, "--out", "run", "--quiet", "--set", f"data.cache_dir={folder}"]
    one_line(fedlm(*words), 1, "No space left on device", "free space or set data.cache_dir")
    assert not [path for path in folder.rglob("*") if path.is_file()]
    disk("size=750k")  # enough for the corpus, not for the base
    one_line(fedlm(*words), 1, "No space left on device", "free space or set data.cache_dir")
    assert list((folder / "bases").iterdir()) == []
    disk("size=10m,ro")
    one_line(fedlm(*words), 1, "Read-only file system", "set data.cache_dir")


def test_a_disk_that_fills_up_loses_nothing(fedlm: Fedlm, here: Fedlm, disk: Mount, tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "long.toml"
    long = "rounds = 30\n" + tiny.read_text().replace("rounds = 2", "", 1)
    config.write_text(long + "eval_every = 0\ncheckpoint_every = 1000\n")  # the last section is [execution]
    settings = [
        "privacy.reproducible_noise=true",
        "privacy.reproducible_cohorts=true",
        "trainable.embedding_rows.count=1800",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    folder = disk("size=4700k")  # checkpoints fit; the journal of 30 rounds, 245 kB each, does not
    stopped = fedlm("simulate", config, *words, "--out", folder / "run", "--quiet")
    one_line(stopped, 1, "the disk is full", "free some space, then `fedlm resume` this run")
    assert not list((folder / "run").rglob("*.tmp"))
    one_line(fedlm("resume", folder / "run", "--quiet"), 1, "the disk is full")
    disk("size=40m")
    resumed = fedlm("resume", folder / "run", "--json", "--quiet").summary
    whole = here(*settings, config=config).summary
    for figure in ("rounds", "perplexity", "devices_trained", "epsilon", "bytes_up_per_device"):
        assert resumed[figure] == whole[figure], figure
    disk("size=40m,ro")
    one_line(fedlm("report", folder / "run"), 1, "Read-only file system")
    one_line(fedlm("simulate", config, "--out", folder / "other"), 1, "read-only: choose another --out")
