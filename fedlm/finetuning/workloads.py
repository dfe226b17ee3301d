"""What `fedlm finetune` trains: the private examples, a task for each phase, scores of held-out examples, the weights.

A workload holds one model. `task` says what trains in it: in the first of two phases everything (X+BiTFiT; Bu et al.
2022, section 4.3), else what [trainable] names; row sets are of federated runs and do not count here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic

import numpy as np
import safetensors.torch
from torch import Tensor, nn

from fedlm.config.schema import Config
from fedlm.config.validate import validate_sizes
from fedlm.data.batching import Batch
from fedlm.data.examples import TextRows, read_rows
from fedlm.data.prompts import read_language_examples
from fedlm.data.vocabulary import Vocabulary, vocabulary_from_tokenizer
from fedlm.data.vocabulary_source import load_vocabulary
from fedlm.errors import ConfigError
from fedlm.example_dp.language import LanguageTask, Sequences
from fedlm.example_dp.task import BatchT, Examples, Task
from fedlm.experiment import is_pretrained, starts_from_base
from fedlm.export.adapter import save_adapter
from fedlm.export.model_card import write_model_card
from fedlm.finetuning import generation
from fedlm.finetuning.classification import ClassificationTask, TextBatch, Texts, accuracy, check_labels
from fedlm.models.base import LanguageModel
from fedlm.models.encoders import Encoder, load_encoder
from fedlm.models.factory import build_model, empty_model
from fedlm.models.pretrained import PretrainedSource
from fedlm.models.re_attention.example_level import NoiseTracker
from fedlm.models.table_names import INPUT_TABLE, OUTPUT_BIAS, OUTPUT_TABLE
from fedlm.models.transformer import TransformerModel
from fedlm.models.weights import in_order, set_weights
from fedlm.pretraining.cache import has_base, load_base
from fedlm.pretraining.train import pretrain
from fedlm.privacy.guarantee import Guarantee
from fedlm.randomness import seed_key, stream
from fedlm.trainable.build import build_trainable

Listener = Callable[[dict[str, object]], None]
TRAINED = "trained.safetensors"


class Workload(ABC, Generic[BatchT]):
    """One fine-tuning job but for its privacy.

    Arguments:
        config: The experiment.

    Attributes:
        examples: The private data.
        model: What is trained.
        metric: Name of the score, of `evaluate`.
    """

    examples: Examples[BatchT]
    model: nn.Module
    metric: str

    def __init__(self, config: Config) -> None:
        rows = replace(config.trainable.embedding_rows, count=0)
        self.config = replace(config, trainable=replace(config.trainable, embedding_rows=rows))
        self._trained: dict[str, Tensor] = {}

    def task(self, *, everything: bool) -> Task[BatchT]:
        """Freeze what does not train in a phase, and return the task of what does.

        Arguments:
            everything: All weights, embeddings included; False: what the config says.
        """
        config = _with_everything(self.config) if everything else self.config
        task = self._task(config, embeddings=everything or config.finetune.embeddings)
        self._trained.update(task.trained)
        return task

    @abstractmethod
    def _task(self, config: Config, *, embeddings: bool) -> Task[BatchT]: ...

    @abstractmethod
    def evaluate(self) -> float | None:
        """Return the score of the held-out examples; None without any. They are not protected."""

    def bleu(self) -> float | None:
        """Return the BLEU of answers to held-out prompts; None where none was asked for."""
        return None

    def note_noise(self, trained: Collection[str], noise_std: float, learning_rate: float) -> None:
        """Be told of a step's noise in what trained; a model with Re-Attention corrects for it."""

    def save(self, folder: Path, guarantee: Guarantee) -> None:
        """Write whatever trained in any phase, and what its training guarantees."""
        lora = self.config.trainable.lora
        if lora.rank:
            host: Any = self.model  # asked for its named parameters alone
            causal = isinstance(self.model, LanguageModel)
            save_adapter(
                host, {}, lora, folder / "adapter", base=self.config.model.name, guarantee=guarantee, causal=causal
            )
        tensors = {
            name.replace(".base_layer", ""): tensor.detach().cpu().contiguous()
            for name, tensor in self._trained.items()
            if ".lora_" not in name
        }
        if tensors:
            metadata = {"format": "pt", "privacy_statement": guarantee.statement}
            (folder / TRAINED).write_bytes(in_order(safetensors.torch.save(tensors, metadata=metadata)))
        write_model_card(folder, guarantee)


class ClassificationWorkload(Workload[TextBatch]):
    """Texts with classes, and an encoder."""

    metric = "accuracy"

    def __init__(self, config: Config, listener: Listener) -> None:
        super().__init__(config)
        settings = config.finetune
        listener({"event": "stage", "text": f"reading {settings.train}"})
        rows = read_rows(Path(settings.train), settings.columns, settings.label)
        test = read_rows(Path(settings.test), settings.columns, settings.label) if settings.test else None
        source = load_encoder(config.model.name)
        self._texts = Texts(rows, source.tokenizer, settings.max_length)
        self.examples = self._texts
        self._test = None if test is None else Texts(test, source.tokenizer, settings.max_length)
        if self._test is not None:
            check_labels(self._texts, self._test)
        self._encoder = Encoder(source.model, self._texts.num_classes, config.seed)
        self.model = self._encoder
        _check_length(config, self._encoder.max_length)

    def _task(self, config: Config, *, embeddings: bool) -> Task[TextBatch]:
        return ClassificationTask(self._encoder, config, embeddings=embeddings)

    def evaluate(self) -> float | None:
        """Return the part of the held-out texts whose class is found."""
        if self._test is None:
            return None
        some = _held_out(len(self._test), self.config)
        return accuracy(self._encoder, self._test, some, self.config.finetune.physical_batch_size)


class LanguageWorkload(Workload[Batch]):
    """Texts, or prompts with answers, and a language model."""

    metric = "perplexity"

    def __init__(self, config: Config, listener: Listener) -> None:
        super().__init__(config)
        settings = config.finetune
        source, self.vocabulary = _vocabulary(self.config, listener)
        validate_sizes(self.config, self.vocabulary.size, "the vocabulary's size")
        own = config.data.sequence_length if config.model.name == "transformer" else None
        _check_length(config, own if source is None else source.max_length)
        listener({"event": "stage", "text": f"reading {settings.train}"})
        sequences, _ = self._read(settings.train)
        self.examples = Sequences(sequences)
        self._test: Batch | None = None
        self._test_rows: TextRows | None = None
        if settings.test:
            self._test, self._test_rows = self._read(settings.test)
        if settings.samples and (self._test_rows is None or len(self._test_rows.columns) < 2):
            raise ConfigError(
                f"finetune.samples = {settings.samples} needs held-out prompts with answers; give finetune.test a file "
                "with two columns of text, or set finetune.samples = 0"
            )
        self.model: LanguageModel = _language_model(self.config, source, self.vocabulary, listener)
        self._tracker = _noise_tracker(self.model, self.config, self.vocabulary)

    def _read(self, path: str) -> tuple[Batch, TextRows | None]:
        settings = self.config.finetune
        return read_language_examples(Path(path), settings.columns, self.vocabulary, settings.max_length)

    def _task(self, config: Config, *, embeddings: bool) -> Task[Batch]:
        tables = _tables(self.model) if embeddings else frozenset[str]()
        trainable = build_trainable(self.model, config)
        key = seed_key(config.seed)
        return LanguageTask(trainable, config, self.vocabulary.frequencies, tables=tables, negatives_key=key)

    def evaluate(self) -> float | None:
        """Return the perplexity of the held-out targets."""
        if self._test is None:
            return None
        some = self._test.select(_held_out(len(self._test.inputs), self.config))
        return generation.perplexity(self.model, some, self.config.finetune.physical_batch_size)

    def bleu(self) -> float | None:
        """Return the BLEU of greedy answers to the first held-out prompts."""
        settings = self.config.finetune
        if not settings.samples or self._test_rows is None:
            return None
        return generation.bleu(self.model, self.vocabulary, self._test_rows, settings.samples, settings.max_length)

    def note_noise(self, trained: Collection[str], noise_std: float, learning_rate: float) -> None:
        """Count a step's noise, if the model attends to it; see `Workload.note_noise`."""
        if self._tracker is not None:
            optimizer = self.config.finetune.optimizer
            self._tracker.after_step(trained, noise_std=noise_std, learning_rate=learning_rate, optimizer=optimizer)


def _noise_tracker(model: LanguageModel, config: Config, vocabulary: Vocabulary) -> NoiseTracker | None:
    if not isinstance(model, TransformerModel) or not model.re_attention:
        return None
    settings = config.finetune
    return NoiseTracker(
        model,
        vocabulary.frequencies,
        num_tokens=settings.max_length,
        batch_size=settings.batch_size,
        kind=config.model.re_attention,
    )


def open_workload(config: Config, listener: Listener) -> Workload[Any]:
    """Read the data and the model of a config.

    Raises:
        ConfigError, DataError: Files that cannot be read, or that do not fit each other.
    """
    if config.finetune.task == "classification":
        return ClassificationWorkload(config, listener)
    return LanguageWorkload(config, listener)


def _with_everything(config: Config) -> Config:
    lora = replace(config.trainable.lora, rank=0)
    return replace(config, trainable=replace(config.trainable, lora=lora, bias=False, dense=("*",)))


def _held_out(count: int, config: Config) -> Any:
    """Return which held-out examples are scored, (m,): the same ones at each evaluation."""
    order = stream(seed_key(config.seed), "finetune/test").permutation(count)
    return np.sort(order[: config.finetune.max_test_examples])


def _check_length(config: Config, longest: int | None) -> None:
    if longest is not None and config.finetune.max_length > longest:
        fix = " (data.sequence_length)" if config.model.name == "transformer" else ""
        raise ConfigError(
            f"finetune.max_length = {config.finetune.max_length} is more than the {longest} positions{fix} of "
            f"{config.model.name!r}; set it to at most {longest}"
        )


def _vocabulary(config: Config, listener: Listener) -> tuple[PretrainedSource | None, Vocabulary]:
    if not is_pretrained(config):
        return None, load_vocabulary(config)
    listener({"event": "stage", "text": f"reading {config.model.name}"})
    source = PretrainedSource.read(config.model.name)
    return source, vocabulary_from_tokenizer(source.tokenizer, source.vocabulary_size)


def _language_model(
    config: Config, source: PretrainedSource | None, vocabulary: Vocabulary, listener: Listener
) -> LanguageModel:
    if source is not None:
        return source.model()
    if not starts_from_base(config):
        return build_model(config, vocabulary.frequencies, config.seed)
    model = empty_model(config, vocabulary.size)
    if config.model.base == "pretrain" and not has_base(config):
        listener({"event": "stage", "text": "training the public base (cached for the next run)"})
        pretrain(config, vocabulary, listener)
    set_weights(model, load_base(config))
    return model


def _tables(model: LanguageModel) -> frozenset[str]:
    present: Mapping[str, bool] = {
        INPUT_TABLE: True,
        OUTPUT_TABLE: not model.tied,
        OUTPUT_BIAS: model.output_bias is not None,
    }
    return frozenset(name for name, there in present.items() if there)
