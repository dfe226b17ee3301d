"""Who takes part: the outcomes against plain recomputation, and that no device decides about another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlm.config.load import load_config
from fedlm.experiment import Experiment
from fedlm.trainable.spec import UpdateSpec
from server.participation import DROPPED_OUT, NO_MEMORY, TOO_LATE, TRAINS, UNAVAILABLE, RoundParticipation, RoundTask
from simulations.fleet.profile import load_profile, parse_profile
from simulations.fleet.virtual import VirtualFleet

SPEC = UpdateSpec.build([("w", "dense", (250_000,))])  # a megabyte
NUM_USERS = 200
TINY = [
    "data.corpus=synthetic", f"synthetic.users={NUM_USERS}", "synthetic.tokens_per_user=20", "synthetic.classes=8",
    "vocabulary.size=100", "trainable.embedding_rows.count=0", "loss.negatives=10", "pretrain.negatives=10",
    "fleet.cohort=10",
]  # fmt: skip


class PerToken:
    """A stand-in for the cost model: a megabyte and a gigaflop a token."""

    def peak_mb(self, num_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return num_tokens.astype(np.float64)

    gigaflops = peak_mb


class PerNeighbour(PerToken):
    """A cost model that interpolates: what it says of a size depends on the largest that it is asked for."""

    def peak_mb(self, num_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return num_tokens + num_tokens.max(initial=0) % 7.0


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def experiment(cache: Path, *overrides: str, num_tokens: Sequence[int] | None = None) -> Experiment:
    """The tiny experiment, with data sizes of our choice."""
    opened = Experiment.open(load_config(None, [*TINY, f"data.cache_dir={cache}", *overrides]))
    if num_tokens is None:
        return opened
    sizes = np.resize(np.array(num_tokens, np.int64), opened.store.num_users)
    return replace(opened, store=replace(opened.store, num_tokens=sizes))


def fleet(opened: Experiment, *lines: str, cost: PerToken | None = None) -> VirtualFleet:
    profile = parse_profile([line + "\n" for line in lines], "test") if lines else load_profile("phones")
    return VirtualFleet(opened, profile, cost or PerToken())


def take(
    fleet: VirtualFleet, cohort: Sequence[int] | npt.NDArray[np.int64], t: int = 1, down: int = 10**6
) -> RoundParticipation:
    ids = np.asarray(cohort, np.int64)
    return fleet.participation(RoundTask(t, ids, SPEC, np.full(len(ids), down)))


def test_memory_is_the_smaller_of_the_profile_s_and_the_cap(cache: Path) -> None:
    opened = experiment(cache, "fleet.memory_mb=25", num_tokens=[10, 20, 25, 30])
    devices = np.arange(100)
    tokens = opened.store.num_tokens[opened.fleet]
    found = take(fleet(opened, "memory_mb", "15", "1000"), devices).outcomes
    limit = np.where(devices % 2, 25, 15)
    assert (found == np.where(tokens[:100] > limit, NO_MEMORY, TRAINS)).all()


def test_the_deadline_cuts_exactly_the_late_ones(cache: Path) -> None:
    opened = experiment(cache, "fleet.deadline_s=20", num_tokens=[10, 170, 180, 181])
    devices = np.arange(100)
    participation = take(fleet(opened, "gflops,down_mbit,up_mbit", "10,8,8"), devices, down=10**6)
    # A megabyte at 8 Mbit/s is a second each way; 10 tokens a second in between.
    expected = 2 + opened.store.num_tokens[opened.fleet[devices]] / 10
    late = expected > 20
    assert 0 < late.sum() < len(late)
    assert (participation.outcomes == np.where(late, TOO_LATE, TRAINS)).all()
    assert np.allclose(participation.seconds, np.minimum(expected, 20))
    assert participation.time is not None
    assert participation.time.round_s == 20
    assert participation.bytes_up.sum() == SPEC.num_bytes * (~late).sum()
    assert participation.bytes_down.sum() == 10**6 * 100


def test_a_round_without_loss_ends_with_its_slowest_device(cache: Path) -> None:
    participation = take(fleet(experiment(cache, num_tokens=[10, 40, 20]), "gflops", "10"), np.arange(50), t=4)
    assert (participation.outcomes == TRAINS).all()
    assert participation.time is not None
    assert (participation.time.start_s, participation.time.round_s) == (3 * 600, 4)


def test_without_limits_everybody_trains_in_no_time(cache: Path) -> None:
    participation = take(fleet(experiment(cache), "class", "any"), np.arange(60))
    assert (participation.outcomes == TRAINS).all()
    assert (participation.seconds == 0).all()


def test_an_empty_cohort_is_a_round_like_any_other(cache: Path) -> None:
    participation = take(fleet(experiment(cache)), [])
    assert participation.absent() == {}
    assert participation.complete({"failed": {}})["virtual"]["device_s_max"] is None


def test_dropouts_have_their_rate_have_downloaded_and_send_nothing(cache: Path) -> None:
    opened = experiment(cache, "fleet.devices=1_000_000")
    participation = take(fleet(opened, "dropout", "0.3"), np.arange(1_000_000))
    dropped = participation.outcomes == DROPPED_OUT
    assert abs(dropped.mean() - 0.3) < 5 * np.sqrt(0.21 / 1e6)
    assert (participation.bytes_down == 10**6).all()
    assert (participation.bytes_up[dropped] == 0).all()


def test_a_million_phones_are_available_as_their_curve_says_and_those_that_are_not_download_nothing(
    cache: Path,
) -> None:
    opened = experiment(cache, "fleet.devices=1_000_000", "fleet.round_interval_s=3600", "fleet.start_hour=3")
    phones = fleet(opened)
    curve = load_profile("phones").available[0].astype(float)
    for t in (1, 9, 14, 23):
        participation = take(phones, np.arange(1_000_000), t=t)
        away = participation.outcomes == UNAVAILABLE
        expected = np.mean([curve[(3 + t - 1 + offset) % 24] for offset in (-8, -7, -6, -5)])
        assert abs((1 - away.mean()) - expected) < 0.003
        assert (participation.bytes_down[away] == 0).all()
        assert (participation.seconds[away] == 0).all()


def test_availability_lasts_for_the_hour_and_dropouts_are_new_in_every_round(cache: Path) -> None:
    opened = experiment(cache, "fleet.devices=5000", "fleet.round_interval_s=1800")
    phones, devices = fleet(opened), np.arange(5000)
    first, second, third = (take(phones, devices, t=t).outcomes for t in (1, 2, 3))
    assert ((first == UNAVAILABLE) == (second == UNAVAILABLE)).all()
    assert ((first == UNAVAILABLE) != (third == UNAVAILABLE)).any()
    assert ((first == DROPPED_OUT) != (second == DROPPED_OUT)).any()


def test_the_same_task_gives_the_same_outcomes_in_any_order(cache: Path) -> None:
    opened = experiment(cache, "fleet.devices=3000")
    devices = np.arange(3000)
    forward = np.stack([take(fleet(opened), devices, t=t).outcomes for t in (1, 2, 3)])
    phones = fleet(opened)
    backward = np.stack([take(phones, devices, t=t).outcomes for t in (3, 2, 1)])
    assert (forward == backward[::-1]).all()
    assert set(forward.flat) == {TRAINS, UNAVAILABLE, DROPPED_OUT}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_device_decides_about_another(cache: Path, data: st.DataObject) -> None:
    """Neighbouring fleets: one device's data has another size, or the device is not sampled; nobody else notices."""
    limits = ("fleet.memory_mb=300", "fleet.deadline_s=40")
    plain = experiment(cache, *limits, num_tokens=[10, 150, 294, 298])
    num_devices = len(plain.fleet)
    device = data.draw(st.integers(0, num_devices - 1))
    sizes = plain.store.num_tokens.copy()
    sizes[plain.fleet[device]] = data.draw(st.integers(1, 10**5))
    changed = replace(plain, store=replace(plain.store, num_tokens=sizes))
    others = np.delete(np.arange(num_devices), device)
    for t in data.draw(st.lists(st.integers(1, 500), min_size=1, max_size=4)):
        before = take(fleet(plain, cost=PerNeighbour()), np.arange(num_devices), t=t)
        after = take(fleet(changed, cost=PerNeighbour()), np.arange(num_devices), t=t)
        without = take(fleet(plain, cost=PerNeighbour()), others, t=t)
        assert (before.outcomes[others] == after.outcomes[others]).all()
        assert (before.outcomes[others] == without.outcomes).all()
        assert before.time is not None
        assert after.time is not None
        assert before.time.start_s == after.time.start_s
