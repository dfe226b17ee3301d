"""The ServerApp: opens the experiment named in the run config, and runs or resumes it."""

from __future__ import annotations

import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlm.config.load import config_from_toml, config_to_toml
from fedlm.config.schema import Config, StrategyConfig
from fedlm.errors import ConfigError
from fedlm.experiment import Experiment, is_pretrained, starts_from_base
from fedlm.plugins import load_object
from fedlm.privacy.plan import PrivacyPlan
from fedlm.strategy import Strategy
from fedlm.trainable.adapters import save_adapter
from fedlm.trainable.build import Trainable
from fedlm.training.base import base_folder, has_base
from fedlm.training.pretrain import pretrain
from server.engine import Engine, Listener
from server.run_folder import CONFIG, PLAN, RunFolder
from server.strategies import BUILT_IN

app = ServerApp()
_listener: Listener = lambda event: None  # noqa: E731  the null listener


def listen(listener: Listener) -> None:
    """Send this process's progress events to `listener`."""
    global _listener
    _listener = listener


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment.

    The run config has `config` (TOML text), `out` (the run folder; empty: a new one below runs/) and `resume`.
    """
    config = config_from_toml(str(context.run_config["config"]))
    out = Path(str(context.run_config.get("out", "")) or default_run_path())
    if resumes := bool(context.run_config.get("resume", False)):
        folder = RunFolder.open(out)
    else:
        ensure_base(config, _listener)
    experiment = Experiment.open(config)
    trainable = experiment.trainable()
    if not resumes:
        folder = new_folder(out, experiment, trainable)
    engine = Engine(
        grid,
        experiment,
        plan=PrivacyPlan.from_json(folder.text(PLAN), seed=config.seed),
        strategy=strategy_of(config.strategy),
        spec=trainable.spec,
        values=trainable.initial_values(),
        folder=folder,
        listener=_listener,
    )
    if resumes:
        engine.resume()
    else:
        engine.start()
    engine.run()
    if config.trainable.lora.rank:
        blocks = trainable.spec.views(engine.state.values)
        base = config.model.name if is_pretrained(config) else str(base_folder(config))
        save_adapter(trainable.model, blocks, config.trainable.lora, out / "adapter", base=base)


def default_run_path() -> Path:
    """Return a new folder name below runs/."""
    return Path("runs") / time.strftime("%Y%m%d-%H%M%S")


def plan_of(experiment: Experiment) -> PrivacyPlan:
    """Return the privacy plan of an experiment."""
    config = experiment.config
    return PrivacyPlan.create(
        config.privacy,
        rounds=config.rounds,
        fleet_size=len(experiment.fleet),
        cohort=config.fleet.cohort,
        seed=config.seed,
    )


def strategy_of(config: StrategyConfig) -> Strategy:
    """Return the strategy that a config names.

    Raises:
        ConfigError: Nothing of that name, or it does not fulfil the contract.
    """
    built_in = BUILT_IN.get(config.kind)
    if built_in is None and ":" not in config.kind:
        known = ", ".join(BUILT_IN)
        raise ConfigError(f"unknown strategy.kind {config.kind!r}; choose {known}, or name your own as pkg.mod:Class")
    kind = built_in or load_object(config.kind, "strategy.kind")
    try:
        strategy = kind(config)
    except TypeError as error:  # another signature, or a SumStrategy without `step`
        raise ConfigError(
            f"strategy.kind = {config.kind!r} cannot be made from a StrategyConfig ({error}); see fedlm.strategy"
        ) from error
    if not isinstance(strategy, Strategy):
        raise ConfigError(f"strategy.kind = {config.kind!r} lacks init, accumulate or finish (fedlm.strategy.Strategy)")
    return strategy


def ensure_base(config: Config, listener: Listener) -> None:
    """Train the public base unless it is in the cache, or the config starts from something else."""
    if starts_from_base(config) and config.model.base == "pretrain" and not has_base(config):
        experiment = Experiment.open(config)
        experiment.check_trainable()  # before minutes of pretraining, not after
        listener({"event": "stage", "text": "training the public base (cached for the next run)"})
        pretrain(config, experiment.vocabulary, listener)


def new_folder(path: Path, experiment: Experiment, trainable: Trainable) -> RunFolder:
    """Make the run folder: the last thing that can fail before the first round."""
    strategy_of(experiment.config.strategy)
    texts = {CONFIG: config_to_toml(experiment.config), PLAN: plan_of(experiment).to_json()}
    return RunFolder.create(path, texts, bytes_needed=16 * trainable.spec.num_bytes)
