"""A row sampler with an option of its own, added from outside in one file."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_job import Job

from fedlm.config.load import load_config
from fedlm.planning.touched_pages import received_probabilities

STRIDE = '''
    """Every n-th row."""
    from dataclasses import dataclass

    import numpy as np

    from fedlm.config.schema import option
    from fedlm.trainable.rows import RowSampler


    @dataclass(frozen=True)
    class StrideOptions:
        stride: int = option(2, "rows from one to the next", low=1, high=7)


    class Stride(RowSampler):
        """Every n-th row, the same in every round."""

        Options = StrideOptions
        is_fixed = True

        def draw(self, frequencies, count, *, seed, round_number):
            return np.arange(count) * self.options.stride

        def inclusion(self, frequencies, count):
            found = np.zeros(len(frequencies))
            found[np.arange(count) * self.options.stride] = 1
            return found
'''
KIND, STEP = "trainable.embedding_rows.sampler=rows_of_mine:Stride", "trainable.embedding_rows.options.stride"


def moved_rows(job: Job) -> set[int]:
    first, last = (load_file(job.run / "checkpoints" / f"round_00000{t}.safetensors")["values"] for t in (0, 2))
    blocks = job.lines("ledger.jsonl")[0]["blocks"]
    start = 0
    for block in blocks:  # the table comes as V rows of the full spec
        if block["kind"] == "rows" and "bias" not in block["name"]:
            break
        start += block["bytes"] // 4
    table = (last - first)[start : start + 300 * 16].reshape(300, 16)
    return set(np.flatnonzero(np.abs(table).max(axis=1)).tolist())


def test_a_row_sampler_beside_the_config_decides_which_rows_train(job: Job) -> None:
    job.write("rows_of_mine", STRIDE)
    job.simulate(KIND, f"{STEP}=3", "trainable.lora.rank=0")
    assert moved_rows(job) == set(range(0, 120, 3))
    code, found, error = job.fedlm("plan", KIND, f"{STEP}=3")
    assert code == 0, error
    assert found["coordinates"] > 40 * 16


def test_correlated_noise_takes_it_because_it_says_that_its_rows_stay(job: Job) -> None:
    job.write("rows_of_mine", STRIDE)
    correlated = ("privacy.mechanism=tree", "fleet.cohort=4", KIND)
    assert job.fedlm("config check", *correlated)[0] == 0
    job.write("rows_of_others", STRIDE.replace("is_fixed = True", "is_fixed = False"))
    assert "takes noise back in later rounds" in job.refusal(
        *correlated[:2], "trainable.embedding_rows.sampler=rows_of_others:Stride"
    )


def test_its_options_are_checked(job: Job) -> None:
    job.write("rows_of_mine", STRIDE)
    assert f"did you mean '{STEP}'?" in job.refusal(KIND, "trainable.embedding_rows.options.strid=3")
    assert f"{STEP} = 8 is not allowed; expected a whole number from 1 to 7" in job.refusal(KIND, f"{STEP}=8")
    assert job.shown(STEP, KIND)["help"] == "rows from one to the next"


def test_memory_planning_asks_the_sampler_and_never_takes_another_one_s_word(job: Job) -> None:
    """What a device has received follows from the sampler that runs: here rows without a chance are never received."""
    job.write("rows_of_mine", STRIDE)
    frequencies = np.full(300, 1 / 300)
    config = load_config(job.folder / "job.toml", [KIND])
    received = received_probabilities(config.trainable.embedding_rows, frequencies, 3)
    assert received.tolist() == [1.0 if row < 80 and row % 2 == 0 else 0.0 for row in range(300)]
    rows = load_config(None, ["trainable.embedding_rows.sampler=dp_adafest"]).trainable.embedding_rows
    plain = load_config(None, ["trainable.embedding_rows.sampler=power"]).trainable.embedding_rows
    zipf = 1 / np.arange(1, 20_001)
    np.testing.assert_array_equal(received_probabilities(rows, zipf, 2), received_probabilities(plain, zipf, 2))


def test_a_set_with_a_row_twice_is_refused(job: Job) -> None:
    job.write("rows_of_mine", STRIDE.replace("np.arange(count) * self.options.stride", "np.zeros(count)", 1))
    code, _, error = job.fedlm("simulate", KIND)
    assert code == 2
    assert "drew in round 1 what is no set of rows" in error


@pytest.mark.parametrize("name", ["unifrom", "nothing"])
def test_an_unknown_sampler_is_no_uniform_one(job: Job, name: str) -> None:
    assert f"trainable.embedding_rows.sampler = '{name}' is unknown" in job.refusal(
        f"trainable.embedding_rows.sampler={name}"
    )
