"""One experiment as frozen, typed dataclasses: the sections and keys of the TOML file, with defaults and ranges.

Every field carries its allowed range or choices and one sentence of help in its metadata; `fedlm config show` prints
them, `fedlm.config.load` enforces them. The defaults are the default job of `fedlm simulate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_UNSET: Any = object()


OptionValue = bool | int | float | str | tuple[str, ...]
"""What an option of a class may be."""


class OptionValues(Mapping[str, Any]):
    """The options of classes that a config names: what differs from their defaults, by option; frozen and hashable.

    `fedlm.config.keys.typed_options` makes an instance of the class's `Options` of them. Where a key names many
    classes, an option of one is `name.option`.
    """

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self._values = dict(sorted((values or {}).items()))

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def of(self, name: str) -> dict[str, Any]:
        """Return the options of one class, where a key names many, by the option's own name."""
        start = f"{name}."
        return {key.removeprefix(start): value for key, value in self._values.items() if key.startswith(start)}

    def __repr__(self) -> str:
        return f"OptionValues({self._values})"


def option(
    default: Any = _UNSET,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    factory: Any = None,
) -> Any:
    """Return a dataclass field with its help and its range: `low`/`high` are inclusive, `above` is exclusive."""
    metadata = {"help": help, "low": low, "high": high, "above": above, "choices": choices}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataConfig:
    """Whose text trains, whose is public, whose is held out."""

    corpus: str = option(
        "chitchat",
        "chitchat, synthetic, a users.jsonl[.xz] file, a text file, hf:NAME, or pkg.mod:function",
    )
    split_by: str = option("article", "how a plain text file becomes users", choices=("article", "line"))
    max_tokens_per_user: int = option(1600, "longer users are cut here", low=2)
    sequence_length: int = option(32, "tokens in one training sequence", low=2, high=4096)
    public_fraction: float = option(0.15, "users who publish their text; the base is trained on it", low=0, high=0.9)
    eval_fraction: float = option(0.1, "users held out, when the corpus has no split of its own", low=0, high=0.9)
    max_eval_tokens: int = option(20_000, "held-out tokens scored at each evaluation", low=1)
    cache_dir: str = option("", "parsed corpora and bases; empty: the user cache folder of this system")


@dataclass(frozen=True)
class SyntheticConfig:
    """The corpus with known entropies (data.corpus = "synthetic")."""

    users: int = option(1000, "number of users", low=2)
    tokens_per_user: int = option(400, "words each user writes", low=2)
    classes: int = option(512, "word classes", low=2)
    persistence: float = option(0.85, "lambda: weight of the class transition against the Zipf marginal", low=0, high=1)
    temperature: float = option(3.0, "spread of the random class affinities", above=0)
    concentration: float = option(8.0, "kappa: Dirichlet concentration of a user's class mixture", above=0)
    zipf_exponent: float = option(1.07, "exponent of the Zipf-Mandelbrot law", above=0)
    zipf_shift: float = option(2.7, "shift of the Zipf-Mandelbrot law", low=0)


@dataclass(frozen=True)
class VocabularyConfig:
    """The public vocabulary and its public frequencies."""

    source: str = option("wordfreq", "wordfreq, a tokenizer.json file, or model (the pretrained model's own)")
    size: int = option(100_000, "entries, special ones included", low=16, high=2_000_000)


@dataclass(frozen=True)
class ModelConfig:
    """The language model."""

    name: str = option("transformer", "transformer, lstm, or a Hugging Face folder or GGUF file")
    d_model: int = option(128, "width", low=8, high=8192)
    num_layers: int = option(2, "layers", low=1, high=128)
    num_heads: int = option(4, "attention heads (transformer)", low=1, high=128)
    d_ff: int = option(0, "feed-forward width (transformer); 0: four times d_model", low=0)
    d_hidden: int = option(0, "hidden width (lstm); 0: d_model", low=0)
    dropout: float = option(0.0, "dropout in local training", low=0, high=0.9)
    tied: bool = option(True, "input and output embedding are one table")
    base: str = option("pretrain", "pretrain (trained once on the public users, cached), random, or a base folder")
    re_attention: str = option(
        "off",
        "transformer: correct attention for the noise of the released weights (docs/re_attention.md); a row's noise is "
        "absolute, or relative to its signal, per_frequency",
        choices=("off", "absolute", "per_frequency"),
    )


@dataclass(frozen=True)
class PretrainConfig:
    """Central training of the public base."""

    corpus: str = option("public", "public (the volunteers of data.corpus), or a text or users.jsonl[.xz] file")
    epochs: int = option(2, "passes over the public text", low=1)
    batch_size: int = option(32, "sequences in a batch", low=1)
    learning_rate: float = option(2e-3, "AdamW, with a linear warm-up and a cosine decay", above=0)
    weight_decay: float = option(0.05, "AdamW, on matrices", low=0)
    negatives: int = option(2048, "negatives of NCE, shared by a batch", low=1)
    max_seconds: float = option(600.0, "give up with an error beyond this", above=0)


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters; rank 0 means none."""

    rank: int = option(8, "rank; 0: no adapters", low=0, high=1024)
    alpha: float = option(16.0, "the product is scaled by alpha / rank", above=0)
    targets: tuple[str, ...] = option(("attention", "mlp"), "attention, mlp, recurrent, or names of linear modules")
    freeze_a: bool = option(False, "FFA-LoRA: only B trains and travels")
    adapter: str = option("", "start from this peft adapter folder; empty: A random, B zero")


@dataclass(frozen=True)
class RowsConfig:
    """Partial Embedding Updates; count 0 means none."""

    sampler: str = option("power", "how each round's public row set is drawn")
    count: int = option(5_000, "rows in a round's set; 0: no embedding rows train", low=0)
    options: OptionValues = option(factory=OptionValues)


@dataclass(frozen=True)
class TrainableConfig:
    """What trains on a device and travels; any combination becomes one update vector."""

    lora: LoraConfig = option(factory=LoraConfig)
    bias: bool = option(False, "train every bias, LayerNorm's included (user-level BiTFiT)")
    added_biases: bool = option(False, "give linear modules that have no bias one, zero at first (Llama)")
    dense: tuple[str, ...] = option((), "glob patterns of further tensors to train whole; '*' trains all of the body")
    embedding_rows: RowsConfig = option(factory=RowsConfig)


@dataclass(frozen=True)
class LossConfig:
    """The local training loss; evaluation is always the exact full softmax."""

    kind: str = option("nce", "training loss")
    options: OptionValues = option(factory=OptionValues)
    negatives: int = option(512, "negatives drawn for each batch", low=1)
    noise_power: float = option(1.0, "negatives ~ public frequency^noise_power", low=0, high=2)
    negatives_from: str = option(
        "vocabulary",
        "rows: only inside the round's row set, other targets masked",
        choices=("vocabulary", "rows"),
    )
    chunk: int = option(512, "vocabulary entries at a time in the full softmax; small enough for the cache", low=16)


@dataclass(frozen=True)
class ExampleDpConfig:
    """Example-level DP-SGD (docs/example_dp.md): one sequence or one labelled text is the unit of privacy."""

    enabled: bool = option(False, "clip each example's gradient and add noise to each step")
    epsilon: float = option(
        0.0, "target that the noise is calibrated to, or with noise_multiplier the budget; 0: neither", low=0
    )
    noise_multiplier: float = option(0.0, "noise std in units of clip_norm; 0: calibrated", low=0)
    delta: float = option(1e-5, "of the guarantee; below one over the number of examples", above=0, high=0.1)
    clip_norm: float = option(0.1, "L2 bound on an example's gradient", above=0)
    clipping: str = option(
        "flat",
        "flat: scaled down to clip_norm where longer; automatic: every example scaled to nearly clip_norm",
        choices=("flat", "automatic"),
    )
    engine: str = option(
        "fedlm", "who computes clipped gradients; opacus: per-sample hooks", choices=("fedlm", "opacus")
    )


@dataclass(frozen=True)
class LocalExampleDpConfig(ExampleDpConfig):
    """DP-SGD on each device inside a round, accounted for apart from the user-level noise.

    `local.batch_size` divides its sums.
    """

    sampling_rate: float = option(
        0.25, "probability of each of a device's sequences to be in a step's batch", above=0, high=1
    )
    steps: int = option(4, "DP-SGD steps of a device in one round; local.epochs does not count", low=1)
    max_rounds: int = option(
        0, "rounds that a device's budget lasts; sampled in more it stays away; 0: every round of the run", low=0
    )


@dataclass(frozen=True)
class LocalConfig:
    """One device's local training: plain SGD."""

    epochs: int = option(1, "passes over the device's text", low=1)
    batch_size: int = option(16, "sequences in a batch", low=1)
    learning_rate: float = option(0.5, "SGD on everything but embedding rows", above=0)
    row_learning_rate: float = option(
        0.2, "SGD on embedding rows; curvature there grows with the hidden state's squared norm, about d_model", above=0
    )
    example_dp: LocalExampleDpConfig = option(factory=LocalExampleDpConfig)


@dataclass(frozen=True)
class StrategyConfig:
    """The server's aggregation strategy."""

    kind: str = option("fedadam", "how releases move the model")
    learning_rate: float = option(0.01, "server learning rate", above=0)
    options: OptionValues = option(factory=OptionValues)


@dataclass(frozen=True)
class PrivacyConfig:
    """User-level differential privacy (docs/privacy.md)."""

    enabled: bool = option(True, "false: no clipping and no noise, stamped NOT PRIVATE")
    clip_norm: float = option(0.3, "L2 bound on a device's update", above=0)
    epsilon: float = option(
        2.0, "target that the noise is calibrated to, or with noise_multiplier the budget; 0: neither", low=0
    )
    noise_multiplier: float = option(
        0.0, "noise std in units of clip_norm; 0: calibrated. Refused if its rounds cost more than epsilon", low=0
    )
    delta: float = option(1e-6, "of the guarantee; below one over the accounted population", above=0, high=0.1)
    mechanism: str = option(
        "gaussian",
        "how the noise of rounds is correlated: gaussian (not at all), blt, banded, tree; local: every device's own; "
        "skellam: each device's part of it, for secure aggregation",
    )
    options: OptionValues = option(factory=OptionValues)
    sampler: str = option(
        "",
        "who is in a cohort: poisson, truncated_poisson, fixed, cyclic_poisson (banded), separated (devices take "
        "turns); empty: the mechanism's own",
    )
    cap: int = option(0, "truncated_poisson: the largest cohort, of the accounted fleet", low=0)
    min_separation: int = option(
        0, "separated: rounds between two of a user's own; 0: as many as the fleet gives", low=0
    )
    max_participations: int = option(0, "most rounds of one user; 0: rounds / min_separation", low=0)
    clip_quantile: float = option(
        0.0, "adaptive clipping: the quantile of update norms that the clip norm follows; 0: it stays", low=0, high=0.99
    )
    clip_learning_rate: float = option(
        0.2, "adaptive clipping: step in the logarithm of the clip norm", above=0, high=2
    )
    allocation: str = option(
        "isotropic",
        "noise by kind of block: isotropic; public (scales from public users); adaptive (sound ANADP, from releases); "
        "per_group (a clip norm each); published (ANADP as published, accounted at its least noise)",
        choices=("isotropic", "public", "adaptive", "per_group", "published"),
    )
    noise_floor: float = option(0.5, "published: least noise of a group, as a part of the nominal", low=0.05, high=1)
    metrics: tuple[str, ...] = option((), "metrics that leave devices with noise")
    metric_options: OptionValues = option(factory=OptionValues)
    non_private_diagnostics: bool = option(
        True, "devices send norms, losses and causes of failure without noise, for the sinks named non-private"
    )
    population: int = option(0, "accounted fleet size; 0: the simulated fleet's own", low=0)
    expected_cohort: int = option(0, "accounted expected cohort; 0: fleet.cohort", low=0)
    reproducible_noise: bool = option(False, "debugging: noise from the seed; stamps the run NOT PRIVATE")
    reproducible_cohorts: bool = option(
        False, "debugging: cohorts from the seed; the stamp says epsilon without amplification by sampling"
    )
    keep_cohort_key: bool = option(
        False, "keep the file that tells who was sampled when (cohort_key) after the run's end; an audit always does"
    )


@dataclass(frozen=True)
class FleetConfig:
    """The simulated fleet (docs/fleet.md); virtual time is the devices' own, not that of the machine."""

    devices: int = option(
        0,
        "devices; 0: one for each training user of the corpus; more than users: device d copies user d % users",
        low=0,
        high=10_000_000,
    )
    cohort: int = option(100, "expected devices a round (Poisson sampling), before over_selection", low=1)
    over_selection: float = option(
        1.0,
        "sample this many times the cohort to make up for dropouts; epsilon is that of the larger one",
        low=1,
        high=50,
    )
    profile: str = option("uniform", "uniform: nothing limits a device; phones: a built-in mix; or a CSV file")
    memory_mb: float = option(0.0, "cap on every device's memory; 0: only its profile's", low=0)
    deadline_s: float = option(0.0, "virtual seconds until a round takes no more replies; 0: round_interval_s", low=0)
    round_interval_s: float = option(600.0, "virtual seconds from one round's start to the next's", above=0)
    start_hour: float = option(0.0, "virtual hour (UTC) at which the first round starts", low=0, high=24)
    device_log: bool = option(False, "write devices.csv: a line for each sampled device and round")

    def sampled(self, cohort: int) -> int:
        """Return how many devices sampling expects when `cohort` of them are wanted."""
        return round(cohort * self.over_selection)

    @property
    def is_unconstrained(self) -> bool:
        """Whether every sampled device takes part, at once."""
        return self.profile == "uniform" and not self.memory_mb


@dataclass(frozen=True)
class ExecutionConfig:
    """Where the devices run."""

    grid: str = option("ray", "ray: worker processes; inprocess: this process", choices=("ray", "inprocess"))
    workers: int = option(0, "workers; 0: one for each processor core", low=0, high=4096)
    address: str = option("", "a running Ray cluster; empty: start one on this machine")
    group_size: int = option(16, "devices that train together in one batched program, at most", low=1, high=1024)
    products: str = option(
        "auto",
        "matrix products: fp32, onednn (another fp32 backend), auto (the faster of them, by a self-test when a run "
        "starts), bf16 (frozen weights rounded to it)",
        choices=("auto", "fp32", "onednn", "bf16"),
    )
    eval_every: int = option(5, "rounds between evaluations; 0: only before the first and after the last", low=0)
    checkpoint_every: int = option(10, "rounds between whole checkpoints (each round is journalled)", low=1)
    start_timeout_s: float = option(600.0, "longest wait for Ray, and for a worker, to start", above=0)
    worker_timeout_s: float = option(600.0, "a worker silent for this long is given up", above=0)


@dataclass(frozen=True)
class EvaluationConfig:
    """Further figures of held-out text; perplexity, bits per byte and log Z are always there."""

    metrics: tuple[str, ...] = option((), "figures of held-out text beside perplexity")
    options: OptionValues = option(factory=OptionValues)


@dataclass(frozen=True)
class FinetuneConfig:
    """Central fine-tuning on one machine, `fedlm finetune`; what trains is the section [trainable]'s."""

    task: str = option(
        "language_model", "language_model, or classification of texts", choices=("language_model", "classification")
    )
    train: str = option("", "private examples: .csv, .tsv, .jsonl, .txt or .tokens, also .xz")
    test: str = option("", "held-out examples of the same form; empty: none")
    columns: tuple[str, ...] = option((), "columns that make up an example's text; empty: by the file's header")
    label: str = option("label", "classification: the column of the class, a whole number from 0")
    max_length: int = option(64, "tokens of an example; longer ones are cut", low=2, high=4096)
    embeddings: bool = option(False, "train the whole embedding tables too")
    epochs: float = option(1.0, "expected passes over the examples", above=0)
    full_epochs: float = option(0.0, "first train all weights for so many passes (X+BiTFiT)", low=0)
    batch_size: int = option(256, "expected examples of a step (Poisson sampling)", low=1)
    physical_batch_size: int = option(32, "examples in memory at a time", low=1)
    optimizer: str = option("adam", "of the noised gradients", choices=("adam", "sgd"))
    learning_rate: float = option(1e-3, "of the optimizer, while what is named in [trainable] trains", above=0)
    full_learning_rate: float = option(0.0, "of full_epochs; 0: learning_rate", low=0)
    max_test_examples: int = option(2_000, "held-out examples scored", low=1)
    samples: int = option(0, "language_model with two columns: generated texts, for BLEU", low=0)
    example_dp: ExampleDpConfig = option(factory=ExampleDpConfig)


@dataclass(frozen=True)
class AuditConfig:
    """Canary devices beside the fleet's own (docs/audit.md): they take part in the run, which is stamped AUDIT."""

    canaries: int = option(0, "devices that contribute a known random direction, as large as the clip lets them", low=0)
    text_canaries: int = option(0, "devices that train on a random phrase", low=0)
    phrase_words: int = option(6, "words in such a phrase", low=2, high=64)
    phrase_repeats: int = option(16, "how often the device wrote its phrase", low=1, high=1000)
    phrase_candidates: int = option(1024, "phrases that a canary's is ranked among, itself included", low=2)


@dataclass(frozen=True)
class Config:
    """One experiment."""

    seed: int = option(1, "public; of everything but privacy noise and cohorts", low=0)
    rounds: int = option(30, "federated rounds", low=1)
    plugin_folders: tuple[str, ...] = option(
        (), "folders of plug-ins named pkg.mod:Class, beside those of the config file and the working folder"
    )
    data: DataConfig = option(factory=DataConfig)
    synthetic: SyntheticConfig = option(factory=SyntheticConfig)
    vocabulary: VocabularyConfig = option(factory=VocabularyConfig)
    model: ModelConfig = option(factory=ModelConfig)
    pretrain: PretrainConfig = option(factory=PretrainConfig)
    trainable: TrainableConfig = option(factory=TrainableConfig)
    loss: LossConfig = option(factory=LossConfig)
    local: LocalConfig = option(factory=LocalConfig)
    strategy: StrategyConfig = option(factory=StrategyConfig)
    privacy: PrivacyConfig = option(factory=PrivacyConfig)
    fleet: FleetConfig = option(factory=FleetConfig)
    execution: ExecutionConfig = option(factory=ExecutionConfig)
    evaluation: EvaluationConfig = option(factory=EvaluationConfig)
    audit: AuditConfig = option(factory=AuditConfig)
    finetune: FinetuneConfig = option(factory=FinetuneConfig)
