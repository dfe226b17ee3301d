"""Impossible combinations are refused, the fix in the message works, and neighbouring possible ones pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlm.config import Config, load_config
from fedlm.config.validate import problems, validate
from fedlm.errors import ConfigError

NO_ROWS = "trainable.embedding_rows.count=0"
NO_LORA = "trainable.lora.rank=0"
QUIET = "privacy.non_private_diagnostics=false"
LOCAL_DP = ["local.example_dp.enabled=true", "local.example_dp.epsilon=8", QUIET]
SMALL = ["vocabulary.size=1000", "pretrain.negatives=100", "trainable.embedding_rows.count=100"]
TINY_SYNTHETIC = ["data.corpus=synthetic", "synthetic.users=50"]

# What a user asks, what the message says, what the user then adds.
CASES = [
    (["model.num_heads=5"], "set model.num_heads = 4", ["model.num_heads=4"]),
    ([NO_ROWS, NO_LORA], "nothing trains", ["trainable.bias=true"]),
    (["trainable.lora.targets=[]"], "no trainable.lora.targets", [NO_LORA]),
    (
        ["trainable.lora.targets=['mlp','recurrent']"],
        "the transformer lacks",
        ["trainable.lora.targets=['mlp']"],
    ),
    (["model.name=lstm"], "['recurrent']", ["trainable.lora.targets=['recurrent']"]),
    (["trainable.embedding_rows.count=100_001"], "at most 100000", ["trainable.embedding_rows.count=100_000"]),
    ([*SMALL, "loss.negatives=1000"], "below 1000", ["loss.negatives=999"]),
    ([*SMALL, "loss.negatives=1000"], "loss.kind = 'full_softmax'", ["loss.kind=full_softmax"]),
    ([*SMALL, "pretrain.negatives=2048"], "set pretrain.negatives below 1000", ["pretrain.negatives=999"]),
    (
        ["data.public_fraction=0.5", "data.eval_fraction=0.5"],
        "no users to train",
        ["data.eval_fraction=0.49"],
    ),
    (["data.public_fraction=0"], "no public users", ["data.public_fraction=0.1"]),
    (["data.public_fraction=0"], "pretrain.corpus to a text file", ["pretrain.corpus=wiki.txt"]),
    (["data.public_fraction=0"], "model.base to a base folder", ["model.base=runs/base"]),
    (["model.base=random"], "trainable.dense = ['*']", ["trainable.dense=['*']"]),
    (["privacy.epsilon=0"], "or privacy.noise_multiplier above 0", ["privacy.noise_multiplier=1"]),
    (["privacy.epsilon=0"], "or privacy.enabled = false", ["privacy.enabled=false"]),
    (["privacy.expected_cohort=500"], "needs privacy.population", ["privacy.population=1_000_000"]),
    (
        ["privacy.population=10_000", "privacy.expected_cohort=10_001"],
        "privacy.expected_cohort = 10001 is more than privacy.population",
        ["privacy.expected_cohort=10_000"],
    ),
    (["privacy.population=99"], "fleet.cohort = 100 is more than privacy.population", ["fleet.cohort=99"]),
    (["fleet.devices=99"], "set fleet.cohort to at most 99", ["fleet.cohort=99"]),
    (
        ["fleet.devices=200", "fleet.over_selection=3"],
        "fleet.over_selection = 3 is more than fleet.devices = 200; set fleet.cohort to at most 66",
        ["fleet.cohort=66"],
    ),
    (
        ["privacy.population=1000", "privacy.expected_cohort=500", "fleet.over_selection=2.5"],
        "set at most 400",
        ["privacy.expected_cohort=400"],
    ),
    (["fleet.deadline_s=601"], "set fleet.deadline_s = 600", ["fleet.deadline_s=600"]),
    (["fleet.profile=phone"], "did you mean 'phones'?", ["fleet.profile=phones"]),
    (TINY_SYNTHETIC, "set fleet.cohort to at most 50", ["fleet.cohort=50"]),
    (
        ["data.corpus=synthetic", "synthetic.classes=100_001"],
        "at least one word",
        ["synthetic.classes=100_000"],
    ),
    (["loss.negatives_from=rows", NO_ROWS], "no rows to draw from", ["loss.negatives_from=vocabulary"]),
    (["loss.negatives_from=rows", "loss.kind=full_softmax"], "needs a loss that draws", ["loss.kind=nce"]),
    (["loss.negatives_from=rows", "loss.negatives=5001"], "at most 5000", ["loss.negatives=5000"]),
    (
        ["execution.grid=inprocess", "execution.address=head:6379"],
        "needs a Ray cluster",
        ["execution.grid=ray"],
    ),
    (["execution.grid=inprocess", "execution.workers=2"], "needs worker processes", ["execution.workers=0"]),
    (["model.name=gpt2/"], "brings its own vocabulary", ["vocabulary.source=model"]),
    (["vocabulary.source=model"], "needs a pretrained model", ["model.name=gpt2/"]),
    (["model.d_hidden=64"], "is of the lstm", ["model.d_hidden=0"]),
    (
        ["model.name=lstm", "trainable.lora.targets=['recurrent']", "model.d_ff=64"],
        "is of the transformer",
        ["model.d_ff=0"],
    ),
    (["data.corpus=chitchatt"], "did you mean 'chitchat'?", ["data.corpus=chitchat"]),
    (["model.name=transfomer"], "did you mean 'transformer'?", ["model.name=transformer"]),
    (["model.base=pretrained"], "did you mean 'pretrain'?", ["model.base=pretrain"]),
    (["vocabulary.source=wordfrq"], "did you mean 'wordfreq'?", ["vocabulary.source=wordfreq"]),
    (
        ["finetune.example_dp.enabled=true"],
        "or finetune.example_dp.noise_multiplier",
        ["finetune.example_dp.epsilon=3"],
    ),
    (["local.example_dp.enabled=true", QUIET], "or local.example_dp.noise_m", ["local.example_dp.noise_multiplier=1"]),
    (LOCAL_DP[:2], "lets devices tell norms", [QUIET]),
    ([*LOCAL_DP, "local.example_dp.engine=opacus"], "'fedlm'", ["local.example_dp.engine=fedlm"]),
    ([*LOCAL_DP, "loss.negatives_from=rows"], "masks targets", ["loss.negatives_from=vocabulary"]),
    ([*LOCAL_DP, "audit.canaries=5"], "set both to 0", ["audit.canaries=0"]),
    ([*LOCAL_DP, "audit.text_canaries=5"], "enabled = false", ["local.example_dp.enabled=false"]),
    (
        [*LOCAL_DP, "trainable.embedding_rows.sampler=dp_adafest"],
        "maps of their words",
        ["trainable.embedding_rows.sampler=power"],
    ),
    (["trainable.added_biases=true"], "adds biases that nothing trains", ["trainable.bias=true"]),
    (["trainable.added_biases=true"], "or trainable.added_biases = false", ["trainable.dense=['*']"]),
]


@pytest.mark.parametrize(("asked", "message", "fix"), CASES)
def test_refused_and_the_fix_works(asked: list[str], message: str, fix: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, asked)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    load_config(None, [*asked, *fix])


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.name=lstm", "model.num_heads=5", "trainable.lora.targets=['recurrent', 'projection']"],
        [NO_LORA, NO_ROWS, "trainable.dense=['*']", "model.base=random"],
        [NO_LORA, "trainable.lora.targets=[]"],
        ["privacy.enabled=false", "privacy.epsilon=0"],
        ["privacy.population=1_000_000"],
        ["model.name=gpt2/", "vocabulary.source=model", "trainable.embedding_rows.count=40_000"],
        ["execution.grid=inprocess", "execution.workers=1"],
        ["finetune.example_dp.enabled=true", "finetune.example_dp.epsilon=3", "finetune.example_dp.engine=opacus"],
    ],
)
def test_unusual_but_possible(overrides: list[str]) -> None:
    assert list(problems(load_config(None, overrides))) == []


def test_a_folder_that_exists_is_no_misspelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'pretrain'"):
        load_config(None, ["model.base=pretrained"])
    (tmp_path / "pretrained").mkdir()
    load_config(None, ["model.base=pretrained"])


def test_all_problems_of_a_config_are_found_and_the_first_is_raised() -> None:
    config = Config()
    validate(config)
    assert list(problems(config)) == []
    with pytest.raises(ConfigError, match=r"^nothing trains"):
        load_config(None, [NO_LORA, NO_ROWS, "fleet.devices=1", "privacy.epsilon=0"])
