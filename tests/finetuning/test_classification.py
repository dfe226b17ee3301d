"""Classification: losses and clipped gradients of each text alone, what trains, and what is scored."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedlm.config.load import load_config
from fedlm.data.examples import TextRows
from fedlm.errors import DataError
from fedlm.example_dp.clip_rule import ClipRule
from fedlm.example_dp.engine import PerExampleEngine
from fedlm.example_dp.per_example_gradients import PerExampleGradients
from fedlm.finetuning.classification import ClassificationTask, Texts, accuracy, check_labels, logits
from fedlm.models.encoders import Encoder, load_encoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
from small_encoders import small_encoder_folder

TEXTS = ["good film", "a very bad and dull story", "the film and the story", "fine", "", "dull dull unknown dull dull"]
LABELS = [1, 0, 2, 1, 0, 0]
BIAS = ["trainable.bias=true", "trainable.lora.rank=0"]
LORA = ["trainable.lora.rank=2"]
FULL = ["trainable.lora.rank=0", "trainable.dense=['*']"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_encoder_folder(tmp_path_factory.mktemp("encoder"))


def make(folder: Path, overrides: list[str], *, embeddings: bool = False) -> tuple[ClassificationTask, Texts]:
    source = load_encoder(folder)
    texts = Texts(TextRows(("text",), [(t,) for t in TEXTS], LABELS), source.tokenizer, max_length=6)
    model = Encoder(source.model, texts.num_classes, seed=1).double()
    return ClassificationTask(model, load_config(None, overrides), embeddings=embeddings), texts


def one_by_one(task: ClassificationTask, texts: Texts) -> list[dict[str, torch.Tensor]]:
    """Each text's gradient, by torch.autograd alone."""
    trained, gradients = dict(task.trained), []
    for index in range(len(texts)):
        batch = texts.batch(np.array([index]))
        loss = F.cross_entropy(logits(task.model, batch), torch.from_numpy(batch.labels))
        parts = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        gradients.append(
            {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(trained.items(), parts, strict=True)}
        )
    return gradients


@pytest.mark.parametrize(
    ("overrides", "embeddings"), [(BIAS, False), (LORA, False), (FULL, True)], ids=["bias", "lora", "full"]
)
def test_clipped_sums_are_those_of_single_texts(folder: Path, overrides: list[str], embeddings: bool) -> None:
    task, texts = make(folder, overrides, embeddings=embeddings)
    rule = ClipRule("flat", 0.5)
    alone = one_by_one(task, texts)
    norms = torch.stack([torch.stack([g.norm() for g in each.values()]).norm() for each in alone])
    found = PerExampleEngine(task).clipped(texts.batch(np.arange(len(texts))), rule)
    torch.testing.assert_close(found.norms, norms, rtol=1e-9, atol=0)
    factors = rule.factors(norms)
    assert (factors < 1).any()
    assert found.sums.keys() == task.trained.keys()
    for name, total in found.sums.items():
        wanted = sum(f * each[name] for f, each in zip(factors, alone, strict=True))
        torch.testing.assert_close(total, wanted, rtol=1e-9, atol=1e-12)


def test_the_classifier_trains_always_and_the_words_on_demand(folder: Path) -> None:
    for overrides, embeddings in ((BIAS, False), (LORA, False), (LORA, True)):
        task, _ = make(folder, overrides, embeddings=embeddings)
        names = set(task.trained)
        assert {"classifier.weight", "classifier.bias"} <= names
        assert ("bert.embeddings.word_embeddings.weight" in names) == embeddings
        frozen = {n for n, p in task.model.named_parameters() if not p.requires_grad}
        assert frozen == {n for n, _ in task.model.named_parameters()} - names
    bias, _ = make(folder, BIAS)
    assert all(name.endswith("bias") or name == "classifier.weight" for name in bias.trained)


def test_losses_are_of_each_text_alone(folder: Path) -> None:
    task, texts = make(folder, BIAS)
    together = task.losses(texts.batch(np.arange(6)), PerExampleGradients(6))
    alone = [task.losses(texts.batch(np.array([i])), PerExampleGradients(1)) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=0)


def test_texts_are_cut_padded_and_scored(folder: Path) -> None:
    task, texts = make(folder, BIAS)
    batch = texts.batch(np.array([4, 1, 3]))
    assert batch.mask.sum(1).tolist() == [2, 6, 3]  # [CLS] and [SEP] around each; the second is cut
    assert not batch.tokens[~batch.mask].any()
    best = logits(task.model, texts.batch(np.arange(6))).argmax(1).numpy()
    for size in (1, 4, 100):
        assert accuracy(task.model, texts, np.arange(6), size) == np.mean(best == LABELS)


def test_a_class_that_only_the_held_out_texts_have_is_refused(folder: Path) -> None:
    _, texts = make(folder, BIAS)
    source = load_encoder(folder)
    test = Texts(TextRows(("text",), [("fine",)], [5]), source.tokenizer, max_length=6)
    with pytest.raises(DataError, match="has the class 5"):
        check_labels(texts, test)
