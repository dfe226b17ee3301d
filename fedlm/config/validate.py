"""Combinations of allowed values that cannot work together, each with the fix.

A check is a small generator over one subject that yields one sentence a problem. Ranges of single values
are in `fedlm.config.schema`; whether a file exists or fits is found by who reads it.

>>> from fedlm.config.load import load_config
>>> load_config(None, ["model.num_heads=5"])
Traceback (most recent call last):
fedlm.errors.ConfigError: model.num_heads = 5 does not divide model.d_model = 128; set model.num_heads = 4
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from fedlm.config.keys import chosen
from fedlm.config.schema import Config
from fedlm.errors import ConfigError
from fedlm.registry import COHORT_SAMPLERS, DP_METRICS, LOSSES, REGISTRIES
from fedlm.suggest import nearest_word

_BUILT_IN_MODELS = ("transformer", "lstm")
_PACKAGED_MODELS = ("minilm", "smollm2")  # of `fedlm.models.packages`
_MODULES_ONLY_OF = {"attention": "transformer", "mlp": "transformer", "recurrent": "lstm"}


def validate(config: Config, *, imports_plugins: bool = True) -> None:
    """Refuse a config whose values are each allowed but cannot work together.

    Arguments:
        config: The experiment.
        imports_plugins: Also ask the classes that it names and that are not built in.

    Raises:
        ConfigError: The first problem found, with its fix.
    """
    for problem in problems(config, imports_plugins=imports_plugins):
        raise ConfigError(problem)


def validate_sizes(config: Config, size: int, name: str) -> None:
    """Refuse row sets and negatives that a vocabulary of `size` entries cannot give.

    Arguments:
        config: The experiment.
        size: V; of a pretrained model it is known only once the model has been read.
        name: What the message calls it.

    Raises:
        ConfigError: The first problem found, with its fix.
    """
    for problem in _sizes(config, size, name):
        raise ConfigError(problem)


def problems(config: Config, *, imports_plugins: bool = True) -> Iterator[str]:
    """Yield every problem of a config, one sentence each; those that the classes it names know of come last."""
    for check in CHECKS:
        yield from check(config)
    for registry in REGISTRIES:
        for name in chosen(config, registry):
            yield from registry.problems(name, config, imports_plugins=imports_plugins)


def _misspelt_words(config: Config) -> Iterator[str]:
    """Keys that take a known word or a path: a near miss of the word that is no path is a typing error."""
    for key, value, words in [
        ("data.corpus", config.data.corpus, ("chitchat", "synthetic")),
        ("vocabulary.source", config.vocabulary.source, ("wordfreq", "model")),
        ("model.name", config.model.name, (*_BUILT_IN_MODELS, *_PACKAGED_MODELS)),
        ("model.base", config.model.base, ("pretrain", "random")),
        ("pretrain.corpus", config.pretrain.corpus, ("public",)),
        ("fleet.profile", config.fleet.profile, ("uniform", "phones")),
    ]:
        word = nearest_word(value, words)
        if word and value not in words and not Path(value).exists():
            yield f"{key} = {value!r} is no known word and no file or folder; did you mean {word!r}?"


def _data(config: Config) -> Iterator[str]:
    public, held_out = config.data.public_fraction, config.data.eval_fraction
    if public + held_out >= 1:
        yield (
            f"data.public_fraction = {public} and data.eval_fraction = {held_out} leave no users to train; "
            "their sum must be below 1"
        )
    if config.data.corpus != "synthetic":
        return
    users, classes = config.synthetic.users, config.synthetic.classes
    if classes > config.vocabulary.size:
        yield (
            f"synthetic.classes = {classes} is more than vocabulary.size = {config.vocabulary.size}; "
            "a class needs at least one word"
        )
    if config.fleet.devices == 0:
        yield from _cohort(config, "synthetic.users", users)


def _model(config: Config) -> Iterator[str]:
    model, source = config.model, config.vocabulary.source
    built_in = model.name in _BUILT_IN_MODELS
    if model.name == "transformer" and model.d_model % model.num_heads:
        yield (
            f"model.num_heads = {model.num_heads} does not divide model.d_model = {model.d_model}; "
            f"set model.num_heads = {_nearest_divisor(model.d_model, model.num_heads)}"
        )
    if built_in and source == "model":
        yield (
            f"vocabulary.source = 'model' needs a pretrained model, but model.name = {model.name!r}; "
            "set vocabulary.source = 'wordfreq' or a tokenizer file"
        )
    if not built_in and source != "model":
        yield (
            f"model.name = {model.name!r} brings its own vocabulary, but vocabulary.source = {source!r}; "
            "set vocabulary.source = 'model'"
        )
    if model.re_attention != "off" and model.name != "transformer":
        yield (
            f"model.re_attention = {model.re_attention!r} corrects the attention of our transformer, but model.name = "
            f"{model.name!r}; set model.re_attention = 'off', or model.name = 'transformer'"
        )
    if model.name == "transformer" and model.d_hidden:
        yield f"model.d_hidden = {model.d_hidden} is of the lstm; set model.d_ff for the transformer"
    if model.name == "lstm" and model.d_ff:
        yield f"model.d_ff = {model.d_ff} is of the transformer; set model.d_hidden for the lstm"


def _base(config: Config) -> Iterator[str]:
    model, pretrain = config.model, config.pretrain
    if model.base == "pretrain" and pretrain.corpus == "public" and config.data.public_fraction == 0:
        yield (
            "model.base = 'pretrain' has no public users to train on; set data.public_fraction above 0, "
            "pretrain.corpus to a text file, or model.base to a base folder"
        )
    if model.base == "random" and model.name in _BUILT_IN_MODELS and not config.trainable.dense:
        yield (
            "model.base = 'random' with a frozen body learns nothing useful; "
            "set trainable.dense = ['*'], or model.base = 'pretrain'"
        )
    if model.base == "pretrain" and _own_size(config) and pretrain.negatives >= config.vocabulary.size:
        yield _too_many_negatives("pretrain.negatives", pretrain.negatives, config.vocabulary.size, "vocabulary.size")


def _trainable(config: Config) -> Iterator[str]:
    trainable, model = config.trainable, config.model.name
    rank, targets = trainable.lora.rank, trainable.lora.targets
    rows = trainable.embedding_rows.count
    if not (rank or trainable.bias or trainable.dense or rows):
        yield (
            "nothing trains: set trainable.lora.rank or trainable.embedding_rows.count above 0, "
            "trainable.bias = true, or trainable.dense = ['*']"
        )
    if trainable.added_biases and not (trainable.bias or trainable.dense):
        yield (
            "trainable.added_biases = true adds biases that nothing trains; set trainable.bias = true, "
            "or trainable.added_biases = false"
        )
    if rank and not targets:
        yield f"trainable.lora.rank = {rank} has no trainable.lora.targets; name some, or set rank 0"
    for target in targets if rank and model in _BUILT_IN_MODELS else ():
        if _MODULES_ONLY_OF.get(target, model) != model:
            own = [name for name, owner in _MODULES_ONLY_OF.items() if owner == model]
            yield f"trainable.lora.targets has {target!r}, which the {model} lacks; set it to {own}"


def _loss(config: Config) -> Iterator[str]:
    loss, rows = config.loss, config.trainable.embedding_rows.count
    sampled, from_rows = LOSSES.resolve(loss.kind).draws_negatives, loss.negatives_from == "rows"
    if from_rows and not sampled:
        yield "loss.negatives_from = 'rows' needs a loss that draws negatives; set loss.kind = 'nce'"
    if from_rows and sampled and rows == 0:
        yield (
            "loss.negatives_from = 'rows' has no rows to draw from; "
            "set trainable.embedding_rows.count above 0, or loss.negatives_from = 'vocabulary'"
        )
    if from_rows and sampled and 0 < rows < loss.negatives:
        yield (
            f"loss.negatives = {loss.negatives} is more than trainable.embedding_rows.count = {rows}; "
            f"set loss.negatives to at most {rows}"
        )


def _own_sizes(config: Config) -> Iterator[str]:
    if _own_size(config):
        yield from _sizes(config, config.vocabulary.size, "vocabulary.size")


def _sizes(config: Config, size: int, name: str) -> Iterator[str]:
    rows, negatives = config.trainable.embedding_rows.count, config.loss.negatives
    if rows > size and not config.finetune.train:  # row sets are of federated runs
        yield f"trainable.embedding_rows.count = {rows} is more than {name} = {size}; set it to at most {size}"
    if LOSSES.resolve(config.loss.kind).draws_negatives and negatives >= size:
        yield _too_many_negatives("loss.negatives", negatives, size, name)


def _privacy(config: Config) -> Iterator[str]:
    privacy = config.privacy
    population, expected = privacy.population, privacy.expected_cohort
    if privacy.enabled and not privacy.epsilon and not privacy.noise_multiplier:
        yield (
            "privacy.enabled = true needs privacy.epsilon or privacy.noise_multiplier above 0; "
            "set one, or privacy.enabled = false"
        )
    if expected and not population:
        yield f"privacy.expected_cohort = {expected} needs privacy.population; set it to the fleet's size"
    name = "privacy.expected_cohort" if expected else "fleet.cohort"
    cohort = expected or config.fleet.cohort
    if population and config.fleet.sampled(cohort) > population:
        yield (
            f"{name} = {cohort}{_over_selected(config)} is more than privacy.population = {population}; "
            f"set at most {_most_wanted(config, population)}"
        )


def _mechanism(config: Config) -> Iterator[str]:
    privacy = config.privacy
    if privacy.cap and not (privacy.sampler and COHORT_SAMPLERS.resolve(privacy.sampler).takes_cap):
        yield f"privacy.cap = {privacy.cap} needs privacy.sampler = 'truncated_poisson'; set it, or privacy.cap = 0"
    if privacy.clip_quantile and privacy.allocation == "per_group":
        yield (
            f"privacy.clip_quantile = {privacy.clip_quantile} follows norms that privacy.allocation = 'per_group' has "
            "already bounded; set clip_quantile = 0, or another allocation"
        )
    for key, names in [("privacy.metrics", privacy.metrics), ("evaluation.metrics", config.evaluation.metrics)]:
        if len(set(names)) < len(names):
            yield f"{key} = {list(names)} names one twice; name each once"
    if privacy.mechanism != "gaussian" and privacy.allocation == "published":
        yield "privacy.allocation = 'published' is built for privacy.mechanism = 'gaussian' alone; set that"


def _cohort(config: Config, name: str, devices: int) -> Iterator[str]:
    """A cohort, over-selection included, of more devices than there are."""
    if config.fleet.sampled(config.fleet.cohort) > devices:
        yield (
            f"fleet.cohort = {config.fleet.cohort}{_over_selected(config)} is more than {name} = {devices}; "
            f"set fleet.cohort to at most {_most_wanted(config, devices)}"
        )


def _over_selected(config: Config) -> str:
    factor = config.fleet.over_selection
    return f" times fleet.over_selection = {factor:g}" if factor > 1 else ""


def _most_wanted(config: Config, devices: int) -> int:
    """The largest cohort that, over-selected, still fits."""
    return int(devices / config.fleet.over_selection)


def _example_dp(config: Config) -> Iterator[str]:
    for name, section in [
        ("finetune.example_dp", config.finetune.example_dp),
        ("local.example_dp", config.local.example_dp),
    ]:
        if section.enabled and not section.epsilon and not section.noise_multiplier:
            yield (
                f"{name}.enabled = true needs {name}.epsilon or {name}.noise_multiplier above 0; "
                f"set one, or {name}.enabled = false"
            )
    if not LOSSES.resolve(config.loss.kind).per_example:
        for name, needs in [
            ("local.example_dp", config.local.example_dp.enabled),
            ("finetune.train", bool(config.finetune.train) and config.finetune.task == "language_model"),
        ]:
            if needs:
                known = ", ".join(kind for kind in LOSSES.built_in if LOSSES.resolve(kind).per_example)
                yield (
                    f"loss.kind = {config.loss.kind!r} has no gradients of single examples, which {name} needs; set "
                    f"loss.kind to one of {known}"
                )
    if config.local.example_dp.enabled:
        yield from _local_example_dp(config)


def _local_example_dp(config: Config) -> Iterator[str]:
    """What leaves a device, or decides its gradients, beside its own noised steps."""
    off = "or local.example_dp.enabled = false"
    if config.local.example_dp.engine != "fedlm":
        yield (
            f"local.example_dp.engine = {config.local.example_dp.engine!r} is the reference for fedlm finetune alone; "
            "set local.example_dp.engine = 'fedlm'"
        )
    if LOSSES.resolve(config.loss.kind).draws_negatives and config.loss.negatives_from == "rows":
        yield (
            "loss.negatives_from = 'rows' masks targets by the row set, which local.example_dp does not know; "
            f"set loss.negatives_from = 'vocabulary', {off}"
        )
    if config.audit.canaries or config.audit.text_canaries:
        yield (
            f"audit.canaries = {config.audit.canaries} and audit.text_canaries = {config.audit.text_canaries} measure "
            f"user-level privacy without noise on the devices; set both to 0, {off}"
        )
    if config.privacy.non_private_diagnostics:
        yield (
            "privacy.non_private_diagnostics = true lets devices tell norms and losses, which local.example_dp does "
            f"not noise; set it to false, {off}"
        )
    for metric in config.privacy.metrics:
        if not DP_METRICS.resolve(metric).reads_training:
            continue
        yield f"privacy.metrics has {metric!r}, which devices with local.example_dp do not tell; leave it out, {off}"
    if not config.fleet.is_unconstrained:
        yield (
            f"fleet.profile = {config.fleet.profile!r} with fleet.memory_mb = {config.fleet.memory_mb:g} predicts what "
            f"plain SGD needs, not local.example_dp; set 'uniform' and 0, {off}"
        )


def _fleet(config: Config) -> Iterator[str]:
    fleet, execution = config.fleet, config.execution
    if fleet.devices:
        yield from _cohort(config, "fleet.devices", fleet.devices)
    if fleet.deadline_s > fleet.round_interval_s:
        yield (
            f"fleet.deadline_s = {fleet.deadline_s:g} is later than the next round, "
            f"fleet.round_interval_s = {fleet.round_interval_s:g}; set fleet.deadline_s = {fleet.round_interval_s:g}"
        )
    if execution.grid == "inprocess" and execution.address:
        yield f"execution.address = {execution.address!r} needs a Ray cluster; set execution.grid = 'ray'"
    if execution.grid == "inprocess" and execution.workers > 1:
        yield (
            f"execution.workers = {execution.workers} needs worker processes; "
            "set execution.grid = 'ray', or execution.workers = 0"
        )


def _finetune(config: Config) -> Iterator[str]:
    """Checks of a job that fine-tunes; without finetune.train the section counts for nothing."""
    finetune, model = config.finetune, config.model.name
    if not finetune.train:
        return
    if finetune.task == "classification" and model in (*_BUILT_IN_MODELS, "smollm2"):
        yield (
            f"finetune.task = 'classification' takes an encoder, but model.name = {model!r}; "
            "set model.name to a folder of the kind of BERT, or 'minilm'"
        )
    if finetune.task == "language_model" and model == "minilm":
        yield "finetune.task = 'language_model' takes no encoder; set finetune.task = 'classification'"
    if finetune.samples and finetune.task != "language_model":
        yield f"finetune.samples = {finetune.samples} are of a language model; set finetune.samples = 0"
    if finetune.samples and not finetune.test:
        yield f"finetune.samples = {finetune.samples} answer held-out prompts; give finetune.test, or set it to 0"
    if finetune.full_learning_rate and not finetune.full_epochs:
        yield (
            f"finetune.full_learning_rate = {finetune.full_learning_rate:g} is of no pass: finetune.full_epochs = 0; "
            "set one of them"
        )
    if model == "transformer" and finetune.max_length > config.data.sequence_length:
        yield (
            f"finetune.max_length = {finetune.max_length} is more than the {config.data.sequence_length} positions of "
            "the model; set data.sequence_length to the same"
        )


CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (
    _misspelt_words,
    _data,
    _model,
    _base,
    _trainable,
    _loss,
    _own_sizes,
    _privacy,
    _mechanism,
    _example_dp,
    _fleet,
    _finetune,
)


def _own_size(config: Config) -> bool:
    """Whether vocabulary.size counts: a pretrained model's vocabulary has the size that it has."""
    return config.vocabulary.source != "model"


def _too_many_negatives(key: str, negatives: int, size: int, name: str) -> str:
    fix = f"set {key} below {size}" + (", or loss.kind = 'full_softmax'" if key == "loss.negatives" else "")
    return f"{key} = {negatives} is not below {name} = {size}; {fix}"


def _nearest_divisor(number: int, near: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))
