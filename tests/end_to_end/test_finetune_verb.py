"""`fedlm finetune` as its users meet it: a real process, one JSON object, one line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_fedlm import Fedlm, one_line

JOB = """
[data]
sequence_length = 16
[vocabulary]
size = 400
[model]
d_model = 16
num_layers = 1
num_heads = 2
base = "random"
[trainable]
dense = ["*"]
lora = { rank = 0 }
embedding_rows = { count = 0 }
[loss]
kind = "full_softmax"
negatives = 100
[pretrain]
negatives = 100
[finetune]
train = "train.txt"
test = "test.txt"
max_length = 16
batch_size = 10
[finetune.example_dp]
enabled = true
noise_multiplier = 1.0
delta = 1e-3
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A config whose files lie beside it, not in the folder where `fedlm` runs."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "train.txt").write_text("the cat sat on the mat\nthe dog ran\n" * 20)
    (folder / "test.txt").write_text("the cat ran\n")
    (folder / "job.toml").write_text(JOB)
    return folder / "job.toml"


def test_a_job_prints_one_object_with_its_guarantee(fedlm: Fedlm, job: Path) -> None:
    summary = fedlm("finetune", job, "--json", "--out", "run").summary
    assert summary["task"] == "language_model"
    assert summary["epsilon"] > 0
    assert summary["noise_multiplier"] == 1.0
    assert "Example-level differential privacy" in summary["privacy_statement"]
    assert summary["perplexity"] != summary["perplexity_initial"]
    assert summary["peak_mb"] > 0
    done = fedlm("finetune", job, "--out", "run")
    one_line(done, 1, "run exists and is not an empty folder")


def test_wrong_input_is_one_line(fedlm: Fedlm, job: Path) -> None:
    (job.parent / "train.txt").write_text("\n")
    one_line(fedlm("finetune", job, "--quiet", "--out", "run"), 2, "train.txt has no example")
    assert not (job.parent.parent / "run").exists()
