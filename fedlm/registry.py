"""What a config can choose by name: mechanisms, samplers, losses, strategies, metrics, each a registry of classes.

A name is that of a built-in class, of an entry point that an installed package offers, or `pkg.mod:Class`; all three
are used alike. A class brings its options: a frozen dataclass `Options` whose fields are made with
`fedlm.config.schema.option`. They are written in a section of their own and checked like every other key
(`fedlm.config.choices`). Nothing is imported before it is asked for: built-in classes stand here as text.

>>> STRATEGIES.resolve("fedavg").__name__
'FedAvg'
>>> STRATEGIES.resolve("fedavgg")
Traceback (most recent call last):
fedlm.errors.ConfigError: strategy.kind = 'fedavgg' is unknown; did you mean 'fedavg'? Known: fedavg, fedadam; or your \
own as pkg.mod:Class
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from fedlm.errors import ConfigError
from fedlm.plugins import import_object, load_object
from fedlm.suggest import nearest_word

T = TypeVar("T")


@dataclass(frozen=True)
class NoOptions:
    """The options of a class that has none."""


@dataclass(frozen=True)
class BuiltIn:
    """A built-in class as text.

    Arguments:
        reference: `pkg.mod:Class`.
        options: Its `Options` as `pkg.mod:Class` in a module that imports nothing heavy; empty: none.
        checks: Whether the class has a `problems` that can find something in a config.
    """

    reference: str
    options: str = ""
    checks: bool = False


class Registry(Generic[T]):
    """The classes that one key of the config can name.

    Arguments:
        key: The config key, `strategy.kind`.
        noun: What a class of this registry is, in words.
        built_in: The built-in classes by name, the default first.
        group: The entry-point group in which packages offer theirs.
        contract: `pkg.mod:Class` that a class has to derive from; empty: any class.
        options_key: The section with the options of the chosen class; empty: no class has any.
        many: Whether the key holds a list of names; then the options are in a subsection of each class's `name`.
    """

    def __init__(
        self,
        key: str,
        noun: str,
        built_in: Mapping[str, BuiltIn],
        *,
        group: str,
        contract: str = "",
        options_key: str = "",
        many: bool = False,
    ) -> None:
        self.key, self.noun, self.group, self.options_key, self.many = key, noun, group, options_key, many
        self._built_in, self._contract = dict(built_in), contract

    @property
    def built_in(self) -> tuple[str, ...]:
        """The names of the built-in classes, the default first."""
        return tuple(self._built_in)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name without a colon: built-in classes, then entry points."""
        return tuple(dict.fromkeys([*self._built_in, *(point.name for point in self._points())]))

    @property
    def allowed(self) -> str:
        """What the key accepts, in words."""
        known = ", ".join(self._built_in)
        each = "a list of" if self.many else "one of"
        return f"{each} {known}, or pkg.mod:Class" if known else f"{each} pkg.mod:Class"

    def resolve(self, name: str) -> type[T]:
        """Return the class of a name.

        Raises:
            ConfigError: Nothing of that name, or no class of this registry's kind.
        """
        return _resolved(self, name)

    def options_of(self, name: str) -> type:
        """Return the dataclass of the options that the class of a name has; a built-in class is not imported for it.

        Raises:
            ConfigError: As `resolve`.
        """
        if name in self._built_in:
            reference = self._built_in[name].options
            options: type = import_object(reference) if reference else NoOptions
            return options
        return getattr(self.resolve(name), "Options", NoOptions)

    def short_name(self, name: str) -> str:
        """Return what figures and option sections call the class of a name: its `name`, or the name itself."""
        return name if name in self._built_in else getattr(self.resolve(name), "name", name)

    def problems(self, name: str, config: Any, *, imports_plugins: bool) -> Iterator[str]:
        """Yield what in a config cannot work with the class of a name, by its `problems`, one sentence each."""
        known = self._built_in.get(name)
        if known.checks if known else imports_plugins:
            yield from getattr(self.resolve(name), "problems", _no_problems)(config)

    def reference(self, kind: type) -> str:
        """Return the name to store for a class, from which `resolve` finds it again."""
        name = getattr(kind, "name", "")
        known = self._built_in.get(name)
        reference = f"{kind.__module__}:{kind.__qualname__}"
        return name if known and known.reference == reference else reference

    def rows(self) -> list[dict[str, str]]:
        """Return `name`, `class` and `help` of everything that can be named; entry points are not imported.

        A broken package must not break the list.
        """
        rows = [
            {"name": name, "class": known.reference, "help": first_line(self.resolve(name))}
            for name, known in self._built_in.items()
        ]
        points = sorted(self._points(), key=lambda point: point.name)
        return rows + [{"name": point.name, "class": point.value, "help": "(entry point)"} for point in points]

    def _points(self) -> list[EntryPoint]:
        return [point for point in entry_points(group=self.group) if point.name not in self._built_in]

    def _load(self, name: str) -> type[T]:
        if name in self._built_in:
            built_in: type[T] = import_object(self._built_in[name].reference)
            return built_in
        if ":" in name:
            return self._checked(load_object(name, self.key), name)
        for point in self._points():
            if point.name == name:
                return self._checked(load_object(point.value.partition("[")[0].strip(), self.key), name)
        near = nearest_word(name, self.names)
        known = f"Known: {', '.join(self.names)}; or" if self.names else "Name"
        hint = f"did you mean {near!r}? " if near else ""
        raise ConfigError(f"{self.key} = {name!r} is unknown; {hint}{known} your own as pkg.mod:Class")

    def _checked(self, found: Any, name: str) -> type[T]:
        contract = import_object(self._contract) if self._contract else object
        is_class = isinstance(found, type) and issubclass(found, contract)
        if not is_class:
            raise ConfigError(
                f"{self.key} = {name!r} is no {self.noun}; name a class"
                + (f" that derives from {self._contract.replace(':', '.')}" if self._contract else "")
            )
        kind: type[T] = found
        return kind


def _no_problems(config: Any) -> Iterator[str]:
    return iter(())


def first_line(kind: type) -> str:
    """Return the first line of a class's docstring."""
    return (inspect.getdoc(kind) or "").partition("\n")[0]


@lru_cache(maxsize=256)
def _resolved(registry: Registry[T], name: str) -> type[T]:
    return registry._load(name)


_OPTIONS = "fedlm.config.built_in_options:"

STRATEGIES: Registry[Any] = Registry(
    "strategy.kind",
    "aggregation strategy",
    {
        "fedavg": BuiltIn("fedlm.strategies.fedavg:FedAvg"),
        "fedadam": BuiltIn("fedlm.strategies.fedadam:FedAdam", f"{_OPTIONS}FedAdamOptions"),
    },
    group="fedlm.strategies",
    options_key="strategy.options",
)

_MECHANISMS = "fedlm.privacy.mechanisms."
MECHANISMS: Registry[Any] = Registry(
    "privacy.mechanism",
    "noise mechanism",
    {
        "gaussian": BuiltIn(f"{_MECHANISMS}gaussian:Gaussian"),
        "blt": BuiltIn(f"{_MECHANISMS}blt:Blt", f"{_OPTIONS}BltOptions", checks=True),
        "banded": BuiltIn(f"{_MECHANISMS}banded:Banded", f"{_OPTIONS}BandedOptions", checks=True),
        "tree": BuiltIn(f"{_MECHANISMS}tree:Tree", checks=True),
        "local": BuiltIn(f"{_MECHANISMS}local_noise:Local"),
        "skellam": BuiltIn(f"{_MECHANISMS}skellam:DistributedSkellam", f"{_OPTIONS}SkellamOptions"),
    },
    group="fedlm.mechanisms",
    contract=f"{_MECHANISMS}base:Mechanism",
    options_key="privacy.options",
)

_SAMPLERS = "fedlm.privacy.sampling.cohort_samplers:"
COHORT_SAMPLERS: Registry[Any] = Registry(
    "privacy.sampler",
    "cohort sampler",
    {
        "poisson": BuiltIn(f"{_SAMPLERS}Poisson"),
        "truncated_poisson": BuiltIn(f"{_SAMPLERS}TruncatedPoisson"),
        "fixed": BuiltIn(f"{_SAMPLERS}Fixed"),
        "cyclic_poisson": BuiltIn(f"{_SAMPLERS}CyclicPoisson"),
        "separated": BuiltIn(f"{_SAMPLERS}Separated"),
    },
    group="fedlm.cohort_samplers",
    contract=f"{_SAMPLERS}CohortSampler",
)

_ROWS = "fedlm.trainable.rows:"
ROW_SAMPLERS: Registry[Any] = Registry(
    "trainable.embedding_rows.sampler",
    "row sampler",
    {
        "power": BuiltIn(f"{_ROWS}Power", f"{_OPTIONS}PowerOptions"),
        "uniform": BuiltIn(f"{_ROWS}Uniform"),
        "top_k": BuiltIn(f"{_ROWS}TopK"),
        "cyclic": BuiltIn(f"{_ROWS}Cyclic"),
        "dp_adafest": BuiltIn(f"{_ROWS}DpAdafest", f"{_OPTIONS}DpAdafestOptions", checks=True),
    },
    group="fedlm.row_samplers",
    contract=f"{_ROWS}RowSampler",
    options_key="trainable.embedding_rows.options",
)

_LOSSES = "fedlm.losses.loss:"
LOSSES: Registry[Any] = Registry(
    "loss.kind",
    "training loss",
    {
        "nce": BuiltIn(f"{_LOSSES}Nce"),
        "sampled_softmax": BuiltIn(f"{_LOSSES}SampledSoftmax"),
        "full_softmax": BuiltIn(f"{_LOSSES}FullSoftmax"),
    },
    group="fedlm.losses",
    contract=f"{_LOSSES}Loss",
    options_key="loss.options",
)

_DP_METRICS = "fedlm.privacy.dp_metrics:"
DP_METRICS: Registry[Any] = Registry(
    "privacy.metrics",
    "DP metric",
    {
        "train_loss": BuiltIn(f"{_DP_METRICS}TrainLoss", f"{_OPTIONS}TrainLossOptions"),
        "num_tokens": BuiltIn(f"{_DP_METRICS}NumTokens", f"{_OPTIONS}NumTokensOptions"),
        "clip_fraction": BuiltIn(f"{_DP_METRICS}ClipFraction"),
    },
    group="fedlm.dp_metrics",
    contract=f"{_DP_METRICS}DPMetric",
    options_key="privacy.metric_options",
    many=True,
)

_EVALUATION = "fedlm.losses.metrics:"
EVALUATION_METRICS: Registry[Any] = Registry(
    "evaluation.metrics",
    "evaluation metric",
    {"next_word_accuracy": BuiltIn(f"{_EVALUATION}NextWordAccuracy")},
    group="fedlm.evaluation_metrics",
    contract=f"{_EVALUATION}EvaluationMetric",
    options_key="evaluation.options",
    many=True,
)

REGISTRIES: tuple[Registry[Any], ...] = (
    STRATEGIES,
    MECHANISMS,
    COHORT_SAMPLERS,
    ROW_SAMPLERS,
    LOSSES,
    DP_METRICS,
    EVALUATION_METRICS,
)
"""Every seam of a config."""
