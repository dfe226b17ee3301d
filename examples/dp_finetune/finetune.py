"""DP-BiTFiT: fine-tune a small GPT-2-like model on private text, biases alone, so that no sequence can be told from it.

    python finetune.py                                      conversations that come with fedlm
    python finetune.py data.corpus=my.txt                   a text of your own; any other key of a config too

The public users' text makes the base, without privacy. The private users' text then trains the biases with DP-SGD. One
example is one sequence of 32 words: what holds for it does not hold for all that a user wrote (docs/example_dp.md).
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import torch

from fedlm.config import Config, load_config
from fedlm.config.schema import ExampleDpConfig
from fedlm.data.batching import Batch, sequences
from fedlm.example_dp.language import LanguageTask, Sequences
from fedlm.example_dp.per_example_gradients import PerExampleGradients
from fedlm.example_dp.plan import ExamplePlan
from fedlm.example_dp.trainer import DpTrainer
from fedlm.experiment import Experiment
from fedlm.randomness import seed_key
from fedlm.trainable.build import build_trainable

SETTINGS = [
    "vocabulary.size=2000", "model.d_model=64", "model.num_layers=2", "model.base=random", "loss.kind=full_softmax",
    "trainable.lora.rank=0", "trainable.embedding_rows.count=0", "trainable.dense=['*']", "data.public_fraction=0.3",
]  # fmt: skip
TABLES = frozenset({"input_table", "output_bias"})


def text_of(experiment: Experiment, split: str, most: int) -> Batch:
    """Return sequences of the users of a split, at most so many users."""
    store, length = experiment.store, experiment.config.data.sequence_length
    parts = [sequences(store.tokens(user), length) for user in experiment.store.users(split)[:most]]
    columns = zip(*((part.inputs, part.targets, part.mask) for part in parts), strict=True)
    return Batch(*(np.concatenate(column) for column in columns))


def held_out_loss(task: LanguageTask, text: Batch) -> float:
    """Return the mean loss of sequences, in nats a word."""
    task.model.eval()
    with torch.no_grad():
        return float(task.losses(text, PerExampleGradients(len(text.inputs))).mean())


def train(
    task: LanguageTask, text: Batch, privacy: ExampleDpConfig, *, epochs: int, learning_rate: float
) -> ExamplePlan:
    """Train what the task trains for some epochs; return the plan, which says what it cost."""
    examples = Sequences(text)
    size = min(256 if privacy.enabled else 32, len(examples))
    steps = round(epochs * len(examples) / size)
    plan = ExamplePlan.create(privacy, num_examples=len(examples), batch_size=size, steps=(steps,), seed=1)
    trainer = DpTrainer(task, examples, plan, optimizer="adam", learning_rate=learning_rate, physical_batch_size=64)
    trainer.train()
    return plan


def main(overrides: list[str]) -> None:
    """Train a base in the open, then its biases in private."""
    config: Config = load_config(None, [*SETTINGS, *overrides])
    experiment = Experiment.open(config)
    public, private, held_out = (text_of(experiment, split, 150) for split in ("public", "train", "eval"))
    trainable, words = experiment.trainable(), experiment.vocabulary.frequencies

    base = LanguageTask(trainable, config, words, tables=TABLES, negatives_key=seed_key(1))
    train(base, public, ExampleDpConfig(enabled=False), epochs=2, learning_rate=3e-3)
    print(f"base: held-out loss {held_out_loss(base, held_out):.3f}")

    bias_only = replace(config, trainable=replace(config.trainable, bias=True, dense=()))
    task = LanguageTask(build_trainable(trainable.model, bias_only), config, words, negatives_key=seed_key(1))
    privacy = ExampleDpConfig(enabled=True, epsilon=8.0, delta=1e-5, clip_norm=0.1)
    plan = train(task, private, privacy, epochs=2, learning_rate=3e-3)
    print(f"fine-tuned: held-out loss {held_out_loss(task, held_out):.3f}")
    print(plan.guarantee().statement)


if __name__ == "__main__":
    main(sys.argv[1:])
