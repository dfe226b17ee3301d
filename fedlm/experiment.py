"""From a config to its parts: vocabulary, token store, model, what trains. Server and nodes all start here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlm.auditing.canaries import Canaries
from fedlm.config.schema import Config
from fedlm.config.validate import validate_sizes
from fedlm.data.store import TokenStore, build_store
from fedlm.data.vocabulary import Vocabulary, vocabulary_from_tokenizer
from fedlm.data.vocabulary_source import load_vocabulary
from fedlm.errors import ConfigError
from fedlm.models.base import LanguageModel
from fedlm.models.factory import OWN_MODELS, build_model, empty_model
from fedlm.models.pretrained import PretrainedSource
from fedlm.models.weights import set_weights
from fedlm.pretraining.cache import load_base
from fedlm.trainable.build import Trainable, build_trainable

Weights = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Experiment:
    """The data side of a run, cheap to open on every worker (everything large is memory-mapped).

    Arguments:
        config: The experiment.
        vocabulary: Public words and frequencies.
        store: The corpus as token ids.
        pretrained: Somebody else's model, read once for all models of this process; None for a model of ours.
    """

    config: Config
    vocabulary: Vocabulary
    store: TokenStore
    pretrained: PretrainedSource | None = None

    @classmethod
    @lru_cache(maxsize=1)
    def open(cls, config: Config) -> Experiment:
        """Load the vocabulary and open the token store, building and caching what is missing."""
        if not is_pretrained(config):
            vocabulary = load_vocabulary(config)
            return cls(config, vocabulary, build_store(config, vocabulary))
        pretrained = PretrainedSource.read(config.model.name)
        _check_fit(config, pretrained)
        vocabulary = vocabulary_from_tokenizer(pretrained.tokenizer, pretrained.vocabulary_size)
        return cls(config, vocabulary, build_store(config, vocabulary), pretrained)

    @cached_property
    def fleet(self) -> npt.NDArray[np.int64]:
        """Users (N,) of the token store: device d holds the text of user `fleet[d]`.

        The rule is public: device d has training user d modulo their number. With more devices than training users
        devices are copies, and what holds for one device does not hold for one user. An audit's canaries come last;
        where a data size is asked for they count as a public or held-out user, whose text they do not hold: no private
        user's size may decide whether a canary has the memory or the time.
        """
        users = self.store.users("train")
        real = np.resize(users, self.canaries.first_device)  # cyclic
        others = [*self.store.users("public")[:1], *self.store.users("eval")[:1], *users[:1]]
        fleet = np.append(real, np.full(self.canaries.count, others[0]))
        fleet.flags.writeable = False
        return fleet

    @cached_property
    def canaries(self) -> Canaries:
        """Which devices are canaries; none unless the run is an audit."""
        audit, num_real = self.config.audit, self.config.fleet.devices or len(self.store.users("train"))
        return Canaries(self.config.seed, num_real, audit.canaries, audit.text_canaries)

    def model(self, weights: Weights | None = None) -> LanguageModel:
        """Build the model with the base's weights.

        Arguments:
            weights: Of the base, when the caller already has them (shared memory); else read from its folder.
        """
        if self.pretrained is not None:
            return self.pretrained.model()
        if self.config.model.base == "random":
            return build_model(self.config, self.vocabulary.frequencies, self.config.seed)
        model = empty_model(self.config, self.vocabulary.size)
        set_weights(model, load_base(self.config) if weights is None else weights)
        return model

    def trainable(self, weights: Weights | None = None) -> Trainable:
        """Build the model and what trains in it."""
        return build_trainable(self.model(weights), self.config)

    def check_trainable(self) -> None:
        """Refuse adapter targets and patterns that the model lacks; needs no base, so it comes before one is trained.

        Raises:
            ConfigError, DataError: As `build_trainable`.
        """
        model = self.pretrained.model() if self.pretrained else empty_model(self.config, self.vocabulary.size)
        build_trainable(model, self.config)


def is_pretrained(config: Config) -> bool:
    """Tell whether the model is somebody else's (a Hugging Face folder or GGUF file), and so its own base."""
    return config.model.name not in OWN_MODELS


def _check_fit(config: Config, pretrained: PretrainedSource) -> None:
    """Refuse what a pretrained model's own sizes rule out; they are known only once it has been read."""
    validate_sizes(config, pretrained.vocabulary_size, "the model's vocabulary size")
    length, longest = config.data.sequence_length, pretrained.max_length
    if longest is not None and length > longest:
        raise ConfigError(
            f"data.sequence_length = {length} is more than the {longest} positions of {config.model.name!r}; "
            f"set it to at most {longest}"
        )


def starts_from_base(config: Config) -> bool:
    """Tell whether the run starts from a base of ours, trained or named."""
    return not is_pretrained(config) and config.model.base != "random"
