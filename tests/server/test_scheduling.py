"""Work items: whole groups, each once, largest first, small at the end; groups: a function of the cohort alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedlm.config.load import load_config
from fedlm.training.grouped.assignment import group_devices
from server.scheduling import MAX_DEVICES, cut_work_items

sizes = st.lists(st.integers(0, 5000), max_size=200).map(lambda tokens: np.array(tokens, np.int64))


@given(num_tokens=sizes, group_size=st.integers(1, 20))
def test_groups_hold_every_device_once_the_largest_first(num_tokens: np.ndarray, group_size: int) -> None:
    config = load_config(None, [f"execution.group_size={group_size}"])
    groups = group_devices(num_tokens, config)
    order = np.concatenate([np.empty(0, np.int64), *groups])
    assert sorted(order) == list(range(len(num_tokens)))
    assert all(0 < len(group) <= group_size for group in groups)
    assert (np.diff(num_tokens[order]) <= 0).all()
    again = group_devices(num_tokens, load_config(None, [f"execution.group_size={group_size}", "execution.workers=2"]))
    assert [group.tolist() for group in again] == [group.tolist() for group in groups]


@given(num_tokens=sizes, num_nodes=st.integers(1, 300), one_each=st.booleans())
def test_work_items_are_runs_of_whole_groups(num_tokens: np.ndarray, num_nodes: int, one_each: bool) -> None:
    groups = group_devices(num_tokens, load_config(None, ["execution.group_size=4"]))
    work_items = cut_work_items(num_tokens, groups, num_nodes=num_nodes, one_each=one_each)
    assert [group.tolist() for work_item in work_items for group in work_item] == [group.tolist() for group in groups]
    assert all(sum(map(len, work_item)) <= MAX_DEVICES for work_item in work_items)
    if one_each:
        assert len(work_items) <= num_nodes


@given(num_tokens=sizes, num_nodes=st.integers(1, 8))
def test_no_work_item_keeps_one_node_busy_while_the_others_have_nothing(num_tokens: np.ndarray, num_nodes: int) -> None:
    groups = group_devices(num_tokens, load_config(None, ["execution.group_size=4"]))
    work_items = cut_work_items(num_tokens, groups, num_nodes=num_nodes, one_each=False)
    work = [float(sum(num_tokens[group].sum() + len(group) for group in work_item)) for work_item in work_items]
    for index, work_item in enumerate(work_items):
        assert len(work_item) == 1 or work[index] <= sum(work[index:]) / (4 * num_nodes) * (1 + 1e-6)
