"""No device of a group changes another: its words and values may be anything, the others keep their bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_grouped_trainer import BASE, KEY, KINDS, LOSSES, MODELS, NONE, Round, V, texts

from fedlm.config.load import load_config
from fedlm.trainable.parts import dense
from fedlm.training.grouped.trainer import GroupTrainer
from fedlm.training.local import LocalTrainer

WORD = V - 1  # the word that only the poisoned devices use
POISON = {"inf": math.inf, "NaN": math.nan, "huge": 3e38, "1e20": 1e20}
TAME = 0.1
LENGTHS = (75, 9, 40, 12, 3, 76)  # two poisoned devices, of which one pads and one makes others pad; the others
POISONED, OTHERS = [0, 1], [2, 3, 4, 5]
FREQUENCIES = np.where(np.arange(V) == WORD, 1e-12, 1 / np.arange(3.0, V + 3))  # nobody draws the word as a negative
FREQUENCIES /= FREQUENCIES.sum()
ROWS = {"frozen": np.arange(3, 23), "trains": np.append(np.arange(3, 22), WORD)}  # the round's set


def poisoned(model: str, kind: str, loss: str, value: float, *, tied: bool = False, rows: str = "frozen") -> Round:
    """Return a round in which the input row of `WORD` is as large as `value`."""
    options = [*MODELS[model], *KINDS[kind], f"loss.kind={loss}", f"model.tied={str(tied).lower()}", "local.epochs=2"]
    return with_row(options, value, rows)


def with_row(options: list[str], value: float, rows: str = "frozen") -> Round:
    """Return a round of an experiment in which the input row of `WORD` is as large as `value`."""
    a_round = Round(load_config(None, [*BASE, *options]))
    if a_round.spec.row_ids is not None:
        a_round.spec = a_round.trainable.spec.with_rows(ROWS[rows])
    table = a_round.trainable.model.input_table.clone()
    table[WORD] = value * torch.linspace(-1, 1, table.shape[1])
    a_round.trainable.model.set_tables(input_table=table)
    return a_round


def fleet() -> list[np.ndarray]:
    """Return the devices' texts; half of those of the poisoned ones is the word."""
    tokens = [np.where(text == WORD, 3, text).astype(np.int32) for text in texts(LENGTHS)]
    for d in POISONED:
        tokens[d][::2] = WORD
    return tokens


def trained(a_round: Round, devices: list[int]) -> dict[int, np.ndarray]:
    """Return the updates of some devices, in groups as large as there may be."""
    trainer, tokens = GroupTrainer(a_round.trainable, a_round.config, FREQUENCIES), fleet()
    trainer.start_round(a_round.spec, a_round.blocks)
    updates = {}
    for start in range(0, len(devices), trainer.largest_group):
        group = devices[start : start + trainer.largest_group]
        results = trainer.train([tokens[d] for d in group], key=KEY, devices=group)
        updates |= {d: dense(r.parts, a_round.spec.size) for d, r in zip(group, results, strict=True)}
    return updates


def cases() -> list[tuple[str, str, str, bool, str]]:
    """Return model, kind, loss, tied and row set.

    With a full softmax the word would be in everybody's scores where tables are tied, and in everybody's update where
    it trains.
    """
    return [
        (model, kind, loss, tied, rows)
        for model in MODELS
        for kind in ("lora", "bias", "dense", "rows", "all")
        for loss in LOSSES
        for tied in (False, True)
        for rows in ROWS
        if not ((tied or rows == "trains") and loss == "full_softmax") and (rows == "frozen" or kind in ("rows", "all"))
    ]


@pytest.mark.parametrize(("model", "kind", "loss", "tied", "rows"), cases())
def test_the_others_keep_their_bits_whatever_one_device_does(
    model: str, kind: str, loss: str, tied: bool, rows: str
) -> None:
    """Poisoned or tame, the shapes are the same; without the devices they are not, and the last bits may differ."""
    everybody = [*POISONED, *OTHERS]
    tame = poisoned(model, kind, loss, TAME, tied=tied, rows=rows)
    expected, absent = trained(tame, everybody), trained(tame, OTHERS)
    for d in OTHERS:
        assert (np.abs(expected[d] - absent[d]) <= tame.rounding(absent[d])).all()
    for name, value in POISON.items():
        found = trained(poisoned(model, kind, loss, value, tied=tied, rows=rows), everybody)
        for d in POISONED:
            assert found[d].tobytes() != expected[d].tobytes()
            assert np.isfinite(expected[d]).all()
        for d in OTHERS:
            assert found[d].tobytes() == expected[d].tobytes(), (name, d)
            assert np.abs(found[d]).max() > 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_poisoned_device_leaves_nothing_to_the_next_group(kind: str, loss: str) -> None:
    a_round, tokens = poisoned("transformer", kind, loss, math.nan), fleet()
    trainers = [GroupTrainer(a_round.trainable, a_round.config, FREQUENCIES) for _ in range(2)]
    for trainer in trainers:
        trainer.start_round(a_round.spec, a_round.blocks)
    before = trainers[0].train(tokens[:1], key=KEY, devices=[0])
    assert not np.isfinite(dense(before[0].parts, a_round.spec.size)).all()
    for d in range(1, len(tokens)):
        one, other = (t.train(tokens[d : d + 1], key=KEY, devices=[d])[0] for t in trainers)
        assert dense(one.parts, a_round.spec.size).tobytes() == dense(other.parts, a_round.spec.size).tobytes()


@pytest.mark.parametrize("loss", ["nce", "sampled_softmax"])
@pytest.mark.parametrize("kind", ["norm", "all", "rows"])
def test_padding_and_idle_steps_of_a_poisoned_device_are_as_if_it_were_alone(kind: str, loss: str) -> None:
    """Targets count where the row set has them. What does not count is infinite here: it is left out, not weighed by 0.

    Most sequences of the first devices count nowhere, which leaves rows and the last norm finite; one has no target.
    """
    norm = [NONE[0], "trainable.dense=['norm.bias']", "trainable.embedding_rows.count=20"]
    own = norm if kind == "norm" else KINDS[kind]
    options = [*own, f"loss.kind={loss}", "loss.negatives_from=rows", "model.tied=false"]
    a_round = with_row(options, math.inf)
    mixed, nothing = np.array([WORD] * 24 + [30] + [4] * 12, np.int32), np.full(30, WORD, np.int32)
    tokens = [mixed, mixed, mixed, nothing, np.full(100, 4, np.int32)]
    local, group = (kind_(a_round.trainable, a_round.config, FREQUENCIES) for kind_ in (LocalTrainer, GroupTrainer))
    for trainer in (local, group):
        trainer.start_round(a_round.spec, a_round.blocks)
    found = [dense(r.parts, a_round.spec.size) for r in group.train(tokens, key=KEY, devices=range(5))]
    for d, update in enumerate(found):
        expected = local.train(tokens[d], key=KEY, device=d).update
        finite = np.isfinite(expected)
        assert (np.isfinite(update) == finite).all(), d
        assert (np.abs(update - expected)[finite] <= a_round.rounding(expected[finite])[finite]).all()
    assert not found[3].any()
    assert all(np.isfinite(update).all() for update in found) == (kind != "all")
