"""Classification of texts: cross-entropy of each text under an encoder with a new linear classifier.

The classifier trains always, also where the section [trainable] asks for biases alone: DP-BiTFiT as published does so
too (Bu et al. 2022, section 4). The number of classes counts as public: it is the shape of the model.

Legend: n examples, B of a batch, T tokens, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fedlm.config.schema import Config
from fedlm.data.examples import TextRows
from fedlm.errors import DataError
from fedlm.example_dp.per_example_gradients import PerExampleGradients
from fedlm.example_dp.task import Task
from fedlm.models.encoders import HEAD, Encoder
from fedlm.models.weights import thaw
from fedlm.trainable.build import build_trainable

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class TextBatch:
    """Texts with their classes.

    Arguments:
        tokens: (B, T) int64, 0 at padding, which stands on the right.
        mask: (B, T) bool, True at tokens.
        labels: (B,) int64.
    """

    tokens: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int64]


class Texts:
    """Labelled texts as tokens; an `Examples[TextBatch]`.

    Arguments:
        rows: With labels.
        tokenizer: The encoder's own, whose template may add tokens ([CLS], [SEP]).
        max_length: T at most, those tokens included; longer texts are cut.
    """

    def __init__(self, rows: TextRows, tokenizer: Tokenizer, max_length: int) -> None:
        assert rows.labels is not None, "texts without classes"
        tokenizer.enable_truncation(max_length)
        pairs: Sequence[Any] = [texts if len(texts) > 1 else texts[0] for texts in rows.texts]
        encodings = tokenizer.encode_batch(pairs)
        self.labels = np.array(rows.labels, np.int64)  # (n,)
        lengths = np.array([len(encoding.ids) for encoding in encodings])  # (n,)
        self._tokens = np.zeros((len(lengths), max(1, lengths.max(initial=0))), np.int32)  # (n, T)
        for row, encoding in enumerate(encodings):
            self._tokens[row, : lengths[row]] = encoding.ids
        self._lengths = lengths

    @property
    def num_classes(self) -> int:
        """K, one more than the largest class."""
        return int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the tokens of some texts, (B,)."""
        return self._lengths[indices]

    def batch(self, indices: npt.NDArray[np.int64]) -> TextBatch:
        """Return some texts as one batch, cut to the longest of them."""
        lengths = self._lengths[indices]  # (B,)
        longest = max(1, int(lengths.max()))
        mask = np.arange(longest) < lengths[:, None]  # (B, T)
        return TextBatch(self._tokens[indices, :longest].astype(np.int64), mask, self.labels[indices])


class ClassificationTask(Task[TextBatch]):
    """An encoder and what trains in it.

    Arguments:
        model: The encoder; what does not train is frozen, adapters are injected.
        config: `trainable` (its embedding rows are of federated runs and do not count), `seed`.
        embeddings: The word embedding trains too.

    Raises:
        ConfigError, DataError: As `build_trainable`.
    """

    def __init__(self, model: Encoder, config: Config, *, embeddings: bool) -> None:
        self.model = model
        self.trained: Mapping[str, Tensor] = _trained(model, config, embeddings)

    def num_examples(self, batch: TextBatch) -> int:
        """Return B."""
        return len(batch.labels)

    def losses(self, batch: TextBatch, per_example: PerExampleGradients) -> Tensor:
        """Return the cross-entropy of each text, (B,)."""
        return F.cross_entropy(logits(self.model, batch), torch.from_numpy(batch.labels), reduction="none")


def logits(model: torch.nn.Module, batch: TextBatch) -> Tensor:
    """Return the logits of texts, (B, K)."""
    return model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.mask))  # type: ignore[no-any-return]


@torch.no_grad()
def accuracy(model: Encoder, texts: Texts, indices: npt.NDArray[np.int64], batch_size: int) -> float:
    """Return the part of some texts (m,) whose class the model finds."""
    model.eval()
    right = 0
    # By length: batches are cut to their longest text, and padding costs time.
    order = indices[np.argsort(texts.lengths(indices), kind="stable")]
    for start in range(0, len(order), batch_size):
        batch = texts.batch(order[start : start + batch_size])
        right += int((logits(model, batch).argmax(1) == torch.from_numpy(batch.labels)).sum())
    return right / len(indices)


def check_labels(train: Texts, test: Texts) -> None:
    """Refuse held-out classes that no training example has.

    Raises:
        DataError: The largest class of the held-out texts is beyond the classifier's.
    """
    if test.num_classes > train.num_classes:
        raise DataError(
            f"finetune.test has the class {test.num_classes - 1}, but finetune.train only 0 to "
            f"{train.num_classes - 1}; give files of one data set"
        )


def _trained(model: Encoder, config: Config, embeddings: bool) -> dict[str, Tensor]:
    no_rows = replace(config.trainable, embedding_rows=replace(config.trainable.embedding_rows, count=0))
    # The rule of federated runs asks a model only for the names of its body and of its linear modules.
    host: Any = model
    trained: dict[str, Tensor] = dict(build_trainable(host, replace(config, trainable=no_rows)).parameters)
    for name, parameter in model.named_parameters():
        is_table = embeddings and name == model.word_table[0]
        if name not in trained and (is_table or name.startswith(f"{HEAD}.")):
            trained[name] = thaw(parameter)
    return trained
