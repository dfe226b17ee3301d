"""Profiles: built-in mixes, CSV files of classes and of devices, and one clear line for each mistake."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedlm.errors import DataError
from simulations.fleet.mixes import MIXES
from simulations.fleet.profile import HOURS, load_profile


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return str(path)


def test_an_unsaid_column_and_an_empty_cell_limit_nothing(tmp_path: Path) -> None:
    name = write(tmp_path / "devices.csv", "class,gflops,dropout", "a,5,", "", "b,,0.5")
    profile = load_profile(name)
    assert profile.gflops.tolist() == [5, np.inf]
    assert profile.dropout.tolist() == [0, 0.5]
    assert np.isinf([profile.memory_mb, profile.down_mbit, profile.up_mbit]).all()
    assert (profile.available == 1).all()
    assert profile.classes == ()
    assert profile.offsets_h.tolist() == [0, 0]


def test_shares_make_classes_and_are_divided_by_their_sum(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path / "mix.csv", "share,class,utc_offsets_h", "3,old,-5 -8", "1,,5.5"))
    assert profile.classes == ("old", "class 2")
    assert profile.shares.tolist() == [0.75, 0.25]
    assert profile.offsets_h.tolist() == [-5, -8, 5.5]
    assert profile.num_offsets.tolist() == [2, 1]


def test_a_built_in_mix_copied_to_a_file_is_the_same_profile(tmp_path: Path) -> None:
    (tmp_path / "copy.csv").write_text(MIXES["phones"], encoding="utf-8-sig")  # as editors on Windows write it
    built_in, copied = load_profile("phones"), load_profile(str(tmp_path / "copy.csv"))
    assert built_in.digest == copied.digest
    assert built_in.classes == copied.classes == ("low", "mid", "high")
    assert (built_in.available == copied.available).all()
    assert built_in.shares.sum() == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["class,dropot", "a,1"], ":1: unknown column 'dropot'; did you mean 'dropout'?"),
        (["class,xyzzy", "a,1"], ":1: unknown column 'xyzzy'; known are class, "),
        (["gflops,gflops", "1,1"], ":1: column 'gflops' occurs 2 times"),
        (["class,dropout", "a,0.1", "b,1.5"], ":3: dropout = '1.5' is not allowed; expected a number >= 0 and <= 1"),
        (["class,gflops", "a,0"], ":2: gflops = '0' is not allowed; expected a number > 0"),
        (["class,gflops", "a,nan"], ":2: gflops = 'nan' is not allowed"),
        (["class,gflops", "a,inf"], ":2: gflops = 'inf' is not allowed"),
        (["class,gflops", "a,fast"], ":2: gflops = 'fast' is not allowed"),
        (["class,h23", "a,2"], ":2: h23 = '2' is not allowed"),
        (["class,utc_offsets_h", "a,-8 +99"], ":2: utc_offsets_h = '+99' is not allowed"),
        (["class,gflops", "a,1", "", "b,1,2"], ":4: 3 cells, but the header has 2"),
        (["class,share", "a,"], ":2: share is empty"),
        (["class,gflops", '"a,1'], ":2: "),
        (["class,gflops"], "has no rows"),
        ([], "has no rows"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_line(tmp_path: Path, lines: list[str], message: str) -> None:
    name = write(tmp_path / "bad.csv", *lines)
    with pytest.raises(DataError) as caught:
        load_profile(name)
    assert str(caught.value).startswith(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no file; choose uniform, phones"):
        load_profile(str(tmp_path / "absent.csv"))
    with pytest.raises(DataError, match="cannot be read"):
        load_profile(str(tmp_path))
    (tmp_path / "latin.csv").write_bytes("class\né\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        load_profile(str(tmp_path / "latin.csv"))


def test_hours_are_columns_of_local_time(tmp_path: Path) -> None:
    values = [str(i / 32) for i in range(24)]
    profile = load_profile(write(tmp_path / "hours.csv", ",".join(reversed(HOURS)), ",".join(reversed(values))))
    assert profile.available[0].tolist() == [i / 32 for i in range(24)]
