"""What canaries put into a node's sum, and the loss of their phrases, against independent computations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from clients.canary_devices import CanaryDevices
from fedlm.auditing.phrase_losses import phrase_losses
from fedlm.config.load import load_config
from fedlm.experiment import Experiment
from fedlm.privacy.clipping.block_scaling import BlockScaling
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.clipping.clipped_sum import new_sum
from fedlm.privacy.clipping.side_queries import ClipBit

SETTINGS = [
    "data.corpus=synthetic", "synthetic.users=40", "synthetic.tokens_per_user=30", "synthetic.classes=8",
    "vocabulary.size=200", "model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.base=random",
    "trainable.dense=['*']", "pretrain.negatives=50", "loss.negatives=50", "trainable.embedding_rows.count=60",
    "trainable.lora.rank=0", "fleet.cohort=4", "fleet.devices=10", "audit.canaries=30", "audit.text_canaries=12",
]  # fmt: skip


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return Experiment.open(load_config(None, [*SETTINGS, f"data.cache_dir={tmp_path_factory.mktemp('cache')}"]))


def kinds(experiment: Experiment) -> dict[str, int]:
    """A device of each kind."""
    canaries = experiment.canaries
    members = canaries.members()
    first = {
        "gradient member": np.flatnonzero(members[:30])[0],
        "gradient stranger": np.flatnonzero(~members[:30])[0],
        "text member": 30 + np.flatnonzero(members[30:])[0],
        "text stranger": 30 + np.flatnonzero(~members[30:])[0],
    }
    return {name: 10 + int(number) for name, number in first.items()} | {"real": 3}


def clip_specs(size: int) -> list[ClipSpec]:
    block_scaling = BlockScaling(((0, 50, 0), (50, size, 1)), (0.2, 3.0))
    return [ClipSpec(0.3), ClipSpec(0.3, None, (ClipBit(0.1, 0.5),)), ClipSpec(0.3, block_scaling)]


@pytest.mark.parametrize("kind", range(3))
def test_a_member_fills_the_clip_norm_in_its_direction_and_a_stranger_adds_nothing(
    experiment: Experiment, kind: int
) -> None:
    spec = experiment.trainable().spec.with_rows(np.arange(5, 65))
    clip_spec = clip_specs(spec.size)[kind]
    host, devices = CanaryDevices(experiment), kinds(experiment)
    total = new_sum(clip_spec, spec.size)
    assert host.contribute(total, spec, [devices["gradient stranger"], devices["text stranger"]]) == []
    assert total.num_devices == 2
    assert not total.to_arrays()[0].any()
    assert host.contribute(total, spec, [devices["gradient member"]]) == []
    vector = total.to_arrays()[0][: spec.size] * clip_spec.unit / clip_spec.update_share
    signs = experiment.canaries.signs(devices["gradient member"] - 10, spec)
    assert vector == pytest.approx(signs * 0.3 / math.sqrt(spec.size), rel=1e-5)


def test_the_others_train_and_text_canaries_on_their_phrase(experiment: Experiment) -> None:
    host, devices = CanaryDevices(experiment), kinds(experiment)
    spec = experiment.trainable().spec.with_rows(np.arange(60))
    total = new_sum(ClipSpec(1.0), spec.size)
    both = [devices["real"], devices["text member"]]
    assert host.contribute(total, spec, both) == both
    assert total.num_devices == 0
    text = host.tokens(devices["text member"])
    assert text is not None
    assert len(text) == 1 + 16 * 7
    assert np.array_equal(text[1:8], text[8:15])
    assert host.tokens(devices["real"]) is None


def test_canaries_are_the_last_devices_and_count_in_the_fleet(experiment: Experiment) -> None:
    assert len(experiment.fleet) == 10 + 30 + 12
    shortest = experiment.store.num_tokens[experiment.store.users("train")].min()
    assert (experiment.store.num_tokens[experiment.fleet[10:]] == shortest).all()


def test_phrase_losses_are_the_dense_softmax(experiment: Experiment, tmp_path: Path) -> None:
    trainable = experiment.trainable()
    generator = np.random.default_rng(1)
    values = trainable.initial_values() + generator.normal(0, 0.05, trainable.spec.size).astype(np.float32)
    phrases = generator.integers(3, 200, (5, 4)).astype(np.int32)
    found = phrase_losses(trainable, values, phrases, boundary=1, chunk=16)
    table = torch.from_numpy(trainable.spec.views(values)["input_table"])
    for words, loss in zip(phrases, found, strict=True):
        expected = 0.0
        for place in range(4):
            prefix = torch.tensor([[1, *words[:place].tolist()]])
            with torch.no_grad():
                hidden = trainable.model.hidden(prefix, torch.ones_like(prefix, dtype=torch.bool))[0, -1]
            bias = trainable.model.output_bias
            logits = hidden @ table.T + (0 if bias is None else bias)
            expected -= float(torch.log_softmax(logits.double(), -1)[int(words[place])])
        assert loss == pytest.approx(expected, rel=1e-5)
