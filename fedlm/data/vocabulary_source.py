"""Where an experiment's vocabulary comes from: public word frequencies, a tokenizer file, or the synthetic corpus."""

from __future__ import annotations

from fedlm.config.schema import Config
from fedlm.data.vocabulary import Vocabulary, vocabulary_from_file, vocabulary_from_wordfreq
from fedlm.errors import DataError


def load_vocabulary(config: Config) -> Vocabulary:
    """Return the vocabulary that `config.vocabulary` describes.

    Arguments:
        config: `vocabulary.source` is "wordfreq" (with the synthetic corpus: that corpus's own words) or a
            tokenizer.json file, whose size `vocabulary.size` must then equal.

    Raises:
        DataError: The source is missing, or has fewer entries than `vocabulary.size`.
    """
    source, size = config.vocabulary.source, config.vocabulary.size
    if source == "wordfreq":
        if config.data.corpus == "synthetic":
            from fedlm.data.synthetic import synthetic_vocabulary

            return synthetic_vocabulary(config)
        return vocabulary_from_wordfreq(size)
    if source == "model":
        raise DataError(
            f"vocabulary.source 'model' needs a pretrained model, but model.name is {config.model.name!r}; "
            "set it to a Hugging Face folder or GGUF file, or set vocabulary.source to wordfreq"
        )
    return vocabulary_from_file(source, size)
