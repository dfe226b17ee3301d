"""Paths in a config, made absolute: a stored run must resume from any folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedlm.config.keys import chosen
from fedlm.config.schema import Config
from fedlm.plugins import folders_of
from fedlm.registry import REGISTRIES

WORDS = frozenset(
    {"chitchat", "synthetic", "wordfreq", "model", "transformer", "lstm", "pretrain", "random", "public"}
    | {"uniform", "phones", "minilm", "smollm2"}
)
"""Values that mean something of their own, whatever lies in the working folder."""


def with_absolute_paths(config: Config) -> Config:
    """Return the config with every path that it names made absolute.

    So are the folders that its plug-ins lie in: nodes and a resumed run find them by `plugin_folders`. A key that takes
    either a name or a path (`data.corpus`, `model.name`) is left alone unless something lies there.
    """
    lora = config.trainable.lora
    return replace(
        config,
        plugin_folders=folders_of(_plugins(config)),
        data=replace(
            config.data,
            corpus=_if_it_exists(config.data.corpus),
            cache_dir=str(Path(config.data.cache_dir).expanduser().resolve()) if config.data.cache_dir else "",
        ),
        vocabulary=replace(config.vocabulary, source=_if_it_exists(config.vocabulary.source)),
        model=replace(config.model, name=_if_it_exists(config.model.name), base=_if_it_exists(config.model.base)),
        pretrain=replace(config.pretrain, corpus=_if_it_exists(config.pretrain.corpus)),
        trainable=replace(config.trainable, lora=replace(lora, adapter=_if_it_exists(lora.adapter))),
        fleet=replace(config.fleet, profile=_if_it_exists(config.fleet.profile)),
        finetune=replace(
            config.finetune, train=_if_it_exists(config.finetune.train), test=_if_it_exists(config.finetune.test)
        ),
    )


def _plugins(config: Config) -> list[str]:
    """Return every `pkg.mod:attribute` that the config names."""
    named = [config.data.corpus, *(name for registry in REGISTRIES for name in chosen(config, registry))]
    return [name for name in named if ":" in name]


def _if_it_exists(text: str) -> str:
    path = Path(text).expanduser()
    return str(path.resolve()) if text and text not in WORDS and path.exists() else text
