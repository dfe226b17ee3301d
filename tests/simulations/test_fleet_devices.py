"""A million devices as arrays: small, distributed as the profile says, and each a function of seed and device."""

from __future__ import annotations

import numpy as np
import pytest

from simulations.fleet.devices import Devices
from simulations.fleet.profile import Profile, load_profile, parse_profile

MILLION = 1_000_000


@pytest.fixture(scope="module")
def phones() -> Devices:
    return Devices.draw(load_profile("phones"), MILLION, seed=3)


def everyone(devices: Devices) -> np.ndarray:
    return np.arange(len(devices.row))


def test_a_device_takes_a_few_dozen_bytes(phones: Devices) -> None:
    assert phones.num_bytes <= 24 * MILLION


def test_shares_of_classes_are_the_profile_s(phones: Devices) -> None:
    found = np.bincount(phones.row) / MILLION
    deviation = np.sqrt(phones.profile.shares * (1 - phones.profile.shares) / MILLION)
    assert (np.abs(found - phones.profile.shares) < 5 * deviation).all()


def test_every_offset_is_equally_likely_and_no_other_occurs(phones: Devices) -> None:
    values, counts = np.unique(phones.offset_h, return_counts=True)
    assert values.tolist() == [-8, -7, -6, -5]
    assert (np.abs(counts / MILLION - 0.25) < 5 * np.sqrt(0.25 * 0.75 / MILLION)).all()


def test_speeds_spread_around_their_class_independently_of_bandwidth(phones: Devices) -> None:
    ids = everyone(phones)
    speed = np.log(phones.gflops(ids) / phones.profile.gflops[phones.row])
    bandwidth = np.log(phones.down_mbit(ids) / phones.profile.down_mbit[phones.row])
    assert abs(np.median(speed)) < 0.002
    assert speed.std() == pytest.approx(0.3, rel=0.01)
    assert abs(np.corrcoef(speed, bandwidth)[0, 1]) < 0.005
    ratio = phones.up_mbit(ids) / phones.profile.up_mbit[phones.row] / np.exp(bandwidth)
    assert np.allclose(ratio, 1, atol=1e-5)


def test_a_device_is_the_same_in_a_fleet_of_any_size(phones: Devices) -> None:
    small = Devices.draw(load_profile("phones"), 1000, seed=3)
    for name in ("row", "speed", "bandwidth", "offset_h"):
        assert (getattr(small, name) == getattr(phones, name)[:1000]).all()
    other = Devices.draw(load_profile("phones"), 1000, seed=4)
    assert (other.row != small.row).mean() > 0.5


def test_availability_follows_local_time(phones: Devices) -> None:
    ids = np.arange(5000)
    curve = phones.profile.available.astype(np.float32)
    for utc_hour in (0.0, 2.99, 23.5, 24 * 40 + 7.0):
        local = np.floor(utc_hour + phones.offset_h[ids]).astype(int) % 24
        assert (phones.available(ids, utc_hour) == curve[phones.row[ids], local]).all()


def test_without_shares_row_and_device_have_the_same_number_modulo_the_rows() -> None:
    trace = parse_profile(["memory_mb,utc_offsets_h\n", "100,1\n", "200,2\n", "300,3\n"], "trace")
    devices = Devices.draw(trace, 8, seed=0)
    ids = everyone(devices)
    assert devices.memory_mb(ids).tolist() == [100, 200, 300, 100, 200, 300, 100, 200]
    assert devices.offset_h.tolist() == [1, 2, 3, 1, 2, 3, 1, 2]


def test_limits_of_nothing_stay_infinite_under_any_spread() -> None:
    profile: Profile = parse_profile(["spread\n", "1\n"], "wide")
    devices = Devices.draw(profile, 100, seed=0)
    assert np.isinf(devices.gflops(everyone(devices))).all()
