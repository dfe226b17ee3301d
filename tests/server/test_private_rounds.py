"""Real runs under every mechanism: stopped and resumed they have the bits of a quiet run, and their noise is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy import stats
from tiny_private_runs import TINY, StoppedError, final, lines, quiet, stop_in

from fedlm.codec import decode
from fedlm.config.schema import Config
from fedlm.errors import ConfigError, DataError, OutputError
from fedlm.privacy.mechanisms import Mechanism
from server.noise_keys import NoiseKeys
from server.run_folder import RunFolder
from simulations.run import resume, simulate

Make = Callable[..., Config]

SAME_ROWS = "trainable.embedding_rows.sampler=top_k"
SELECTION = (
    "trainable.embedding_rows.sampler=dp_adafest", "trainable.embedding_rows.options.selection_rounds=2",
    "trainable.embedding_rows.options.selection_threshold=0.5",
)  # fmt: skip
VARIANTS = {
    "blt": ("privacy.mechanism=blt", SAME_ROWS),
    "banded": ("privacy.mechanism=banded", "privacy.options.bands=3", SAME_ROWS, "privacy.allocation=public"),
    "tree": ("privacy.mechanism=tree", SAME_ROWS),
    "clip": ("privacy.clip_quantile=0.6", 'privacy.metrics=["train_loss", "clip_fraction"]'),
    "adaptive": ("privacy.allocation=adaptive",),
    "published": ("privacy.allocation=published",),
    "selection": SELECTION,
    # Every side query and a moving clip norm; the encoded sum's size changes after the first two rounds.
    "skellam": (
        "privacy.mechanism=skellam", "privacy.clip_quantile=0.6", 'privacy.metrics=["train_loss"]',
        "privacy.allocation=adaptive", "privacy.epsilon=4", *SELECTION,
    ),
}  # fmt: skip


def state_text(run: Path) -> str:
    return str(json.loads((run / "checkpoints" / "round_000005.json").read_text())["privacy_state"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("killed", [False, True])
def test_a_run_stopped_in_mid_round_resumes_to_the_same_bits(
    small: Make, tmp_path: Path, variant: str, killed: bool
) -> None:
    """From its last checkpoint, and, as after kill -9, from the first one and the journal."""
    config = small(*TINY, *VARIANTS[variant])
    simulate(config, tmp_path / "quiet", quiet)
    with pytest.raises(StoppedError):
        simulate(config, tmp_path / "run", stop_in(3))
    if killed:
        for file in (tmp_path / "run" / "checkpoints").glob("round_000002.*"):
            file.unlink()
    resume(tmp_path / "run", quiet)
    mine, theirs = final(tmp_path / "run"), final(tmp_path / "quiet")
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert state_text(tmp_path / "run") == state_text(tmp_path / "quiet")
    kept = ("clip_norm", "scales", "dp_metrics", "epsilon", "update_norm")
    one, two = ([{k: m.get(k) for k in kept} for m in lines(tmp_path / r, "metrics.jsonl")] for r in ("run", "quiet"))
    assert one == two
    assert not (tmp_path / "run" / "noise_keys").exists()
    end = lines(tmp_path / "run", "ledger.jsonl")[-1]
    assert end["separation"] >= 1
    assert end["max_participations"] >= 1
    assert "epsilon_realised" not in end  # reproducible noise has none
    if variant in ("selection", "skellam"):
        assert "privacy.word_scores" in mine


def releases(run: Path) -> dict[int, Any]:
    files = sorted((run / "journal").glob("round_*.safetensors"))
    return {int(f.stem.removeprefix("round_")): load_file(f)["mean"] for f in files}


@pytest.mark.parametrize("mechanism", ["blt", "banded"])
def test_correlated_noise_goes_on_after_a_crash_between_key_and_release(
    small: Make, tmp_path: Path, mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key of the round that died is never used; whitened by C, noise of all rounds is white across the restart."""
    config = small(
        *TINY, SAME_ROWS, f"privacy.mechanism={mechanism}", "privacy.epsilon=0", "privacy.noise_multiplier=3000",
        "privacy.reproducible_noise=false", "trainable.embedding_rows.count=200", "execution.checkpoint_every=100",
        *(["privacy.options.bands=3"] if mechanism == "banded" else []),
    )  # fmt: skip
    write = RunFolder.write_release

    def fail_in_round_3(self: RunFolder, round_number: int, *rest: Any) -> None:
        if round_number == 3:
            raise OutputError("the disk is full")
        write(self, round_number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_release", fail_in_round_3)
        with pytest.raises(OutputError):
            simulate(config, tmp_path / "run", quiet)
    before, found = NoiseKeys(tmp_path / "run").keys(), releases(tmp_path / "run")
    assert len(before) == 3
    assert (tmp_path / "run" / "noise_keys").stat().st_mode & 0o777 == 0o600
    after: list[int] = []
    monkeypatch.setattr(NoiseKeys, "forget", lambda self: after.extend(self.keys()))
    resume(tmp_path / "run", quiet)
    assert after[:2] == before[:2]
    assert before[2] not in after
    assert len(set(after)) == 5
    found |= releases(tmp_path / "run")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    matrix = _matrix(plan["mechanism"])
    std = plan["noise_multiplier"] * plan["adaptive_rule"]["clip_norm"] / plan["expected_cohort"]
    white = matrix @ np.stack([found[t] for t in range(1, 6)]).astype(np.float64) / std  # (T, P)
    for row in white:
        assert stats.kstest(row, "norm").pvalue > 1e-5
    correlations = np.corrcoef(white) - np.eye(5)
    assert np.abs(correlations).max() < 6 / np.sqrt(white.shape[1])


def _matrix(fields: dict[str, Any]) -> Any:
    column = decode(Mechanism, fields, where="stored mechanism").column  # type: ignore[attr-defined]
    matrix = np.zeros((5, 5))
    for t in range(5):
        matrix[t, : t + 1] = column[: t + 1][::-1]
    return matrix


def test_a_run_whose_keys_are_lost_is_not_resumed(small: Make, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        simulate(small(*TINY, *VARIANTS["blt"]), tmp_path / "run", stop_in(3))
    (tmp_path / "run" / "noise_keys").unlink()
    with pytest.raises(DataError, match="noise keys of 0 rounds, 2 were released"):
        resume(tmp_path / "run", quiet)


@pytest.mark.parametrize("variant", ["blt", "clip"])
def test_the_realised_epsilon_is_told_where_it_is_true(small: Make, tmp_path: Path, variant: str) -> None:
    secret = ("privacy.reproducible_noise=false", "privacy.reproducible_cohorts=false")
    real = (*TINY, *VARIANTS[variant], "rounds=3", *secret)
    mimicked = ("privacy.population=1000000", "privacy.expected_cohort=1000")
    for name, settings in (("real", real), ("mimicked", (*real, *mimicked))):
        simulate(small(*settings), tmp_path / name, quiet)
    end = lines(tmp_path / "real", "ledger.jsonl")[-1]
    assert 0 < end["epsilon_realised"] <= 2 * (1 + 1e-4)
    assert "epsilon_realised" not in lines(tmp_path / "mimicked", "ledger.jsonl")[-1]


def test_nobody_runs_in_a_folder_twice_or_with_another_config(small: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(StoppedError):
        simulate(small(*TINY, *VARIANTS["blt"]), run, stop_in(3))
    with RunFolder.open(run).locked(), pytest.raises(OutputError, match="in use by another process"):
        resume(run, quiet)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("cohort = 12", "cohort = 13"))
    with pytest.raises(DataError, match=r"config\.toml changed"):
        resume(run, quiet)
    (run / "config.toml").write_text(text.replace("checkpoint_every = 3", "checkpoint_every = 4"))
    resume(run, quiet)


@pytest.mark.parametrize("start", [0.01, 100.0])
def test_the_clip_norm_of_a_real_run_reaches_the_quantile_of_its_devices(
    small: Make, tmp_path: Path, start: float
) -> None:
    """The model stands still, so that there is one quantile to reach."""
    clip = ("privacy.clip_quantile=0.5", f"privacy.clip_norm={start * 0.2}", "privacy.clip_learning_rate=0.4")
    rest = ("rounds=60", "fleet.cohort=40", "strategy.learning_rate=1e-9", "execution.checkpoint_every=100")
    simulate(small(*TINY, *clip, *rest, SAME_ROWS), tmp_path / "run", quiet)
    metrics = lines(tmp_path / "run", "metrics.jsonl")[-20:]
    truth = np.median([line["non_private"]["client_norm_median"] for line in metrics])
    assert 0.2 / 5 < truth < 0.2 * 5  # the start was far off
    assert np.mean([line["clip_norm"] for line in metrics]) == pytest.approx(truth, rel=0.1)


def test_without_the_non_private_sink_no_norm_loss_or_cause_leaves_a_device(small: Make, tmp_path: Path) -> None:
    config = small(*TINY, "rounds=2", "privacy.non_private_diagnostics=false", 'privacy.metrics=["train_loss"]',
                   "privacy.epsilon=0", "privacy.noise_multiplier=0.001")  # fmt: skip
    simulate(config, tmp_path / "run", quiet)
    for line in lines(tmp_path / "run", "metrics.jsonl")[1:]:
        assert line["non_private"] == {}
        assert 0 < line["dp_metrics"]["train_loss"] < 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("privacy.mechanism=blt",), "sampler = 'power'; set it to 'top_k'"),
        (("privacy.mechanism=blt", SAME_ROWS, "privacy.clip_quantile=0.5"), "clip_quantile = 0"),
        (("privacy.mechanism=blt", SAME_ROWS, "privacy.allocation=adaptive"), "isotropic or public"),
        (("privacy.mechanism=blt", SAME_ROWS, "privacy.min_separation=500"), "privacy.min_separation = 500"),
        (("privacy.sampler=poisson", "privacy.max_participations=2"), "separated"),
        (("privacy.sampler=cyclic_poisson",), "sampler"),
        (("privacy.sampler=possion",), "sampler"),
        (("privacy.cap=3",), "truncated_poisson"),
        (('privacy.metrics=["loss"]',), "train_loss"),
        (("trainable.embedding_rows.sampler=dp_adafest",), "selection_rounds"),
        (
            ("privacy.allocation=public", "data.public_fraction=0", "model.base=random", 'trainable.dense=["*"]'),
            "public",
        ),
    ],
)
def test_combinations_without_a_guarantee_are_refused_before_the_first_round(
    small: Make, tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(small(*TINY, *settings), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()
