"""Splits depend on names alone, and held-out users never train."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlm.config.schema import DataConfig
from fedlm.data.users import assign_split
from fedlm.errors import DataError

fractions = st.floats(0, 0.9)


@given(user=st.text(), public=fractions, other_public=fractions, held_out=fractions)
def test_public_fraction_never_moves_a_user_into_or_out_of_evaluation(
    user: str, public: float, other_public: float, held_out: float
) -> None:
    one = assign_split(user, "", DataConfig(public_fraction=public, eval_fraction=held_out))
    other = assign_split(user, "", DataConfig(public_fraction=other_public, eval_fraction=held_out))
    assert (one == "eval") == (other == "eval")


@given(user=st.text(), low=fractions, high=fractions)
def test_a_larger_eval_fraction_keeps_the_users_already_held_out(user: str, low: float, high: float) -> None:
    low, high = sorted((low, high))
    if assign_split(user, "", DataConfig(eval_fraction=low)) == "eval":
        assert assign_split(user, "", DataConfig(eval_fraction=high)) == "eval"


@given(user=st.text(), own=st.sampled_from(["dev", "valid", "validation", "test"]), public=fractions)
def test_the_corpus_own_held_out_users_stay_held_out(user: str, own: str, public: float) -> None:
    assert assign_split(user, own, DataConfig(public_fraction=public, eval_fraction=0)) == "eval"


@given(user=st.text(), held_out=fractions)
def test_the_corpus_own_training_users_are_not_held_out(user: str, held_out: float) -> None:
    data = DataConfig(public_fraction=0, eval_fraction=held_out)
    assert assign_split(user, "train", data) == "train"


def test_shares_follow_the_fractions() -> None:
    num_users = 20_000
    splits = [assign_split(f"user {n}", "", DataConfig()) for n in range(num_users)]
    # Five standard deviations of a binomial share are at most 0.018 here.
    assert splits.count("eval") / num_users == pytest.approx(0.1, abs=0.018)
    assert splits.count("public") / num_users == pytest.approx(0.9 * 0.15, abs=0.018)


def test_an_unknown_split_names_the_user_and_what_is_allowed() -> None:
    with pytest.raises(DataError, match=r"user 'ann' has split 'holdout'; allowed are train, .*test"):
        assign_split("ann", "holdout", DataConfig())
