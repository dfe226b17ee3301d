"""The ServerApp: opens the experiment named in the run config, and runs or resumes it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlm.config.load import config_from_toml, config_to_toml
from fedlm.config.schema import Config
from fedlm.errors import ConfigError
from fedlm.experiment import Experiment, is_pretrained, starts_from_base
from fedlm.export.adapter import save_adapter
from fedlm.planning.forecast import schedule_of, structure
from fedlm.pretraining.cache import base_folder, has_base
from fedlm.pretraining.train import pretrain
from fedlm.privacy.adaptive.allocation import groups_of
from fedlm.privacy.plan import PrivacyPlan
from fedlm.registry import MECHANISMS
from fedlm.strategies.contract import strategy_of
from fedlm.trainable.build import Trainable, build_trainable
from fedlm.trainable.rows import sampler_of
from fedlm.training.grouped.trainer import why_not_grouped
from server.cohort_key_file import NAME as COHORT_KEY
from server.cohort_key_file import stored_cohort_key
from server.engine import Engine, Listener
from server.participation import EveryDevice, Fleet
from server.public_moments import PublicMoments, public_moments
from server.round import check_switches
from server.run_folder import CONFIG, PLAN, RunFolder
from server.run_guarantee import run_guarantee

FleetMaker = Callable[[Experiment, Trainable], Fleet]
app = ServerApp()


@dataclass(frozen=True)
class RunContext:
    """What the program around a ServerApp gives it.

    Arguments:
        listener: Receives progress events.
        fleet: Makes the fleet of an experiment and of what trains in it; None: real nodes, which all take part.
    """

    listener: Listener = lambda event: None
    fleet: FleetMaker | None = None


_run_context = RunContext()


def use_run_context(run_context: RunContext) -> None:
    """Use this run context for every run of this process from now on."""
    global _run_context
    _run_context = run_context


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
        ensure_base(config, _run_context.listener)
    experiment = Experiment.open(config)
    trainable = experiment.trainable()
    fleet = _fleet_of(experiment, trainable)
    if reason := why_not_grouped(trainable, config):
        _run_context.listener({"event": "note", "text": f"devices train one by one: {reason}"})
    if not resumes:
        folder = new_folder(out, experiment, trainable)
    with folder.locked():
        plan = PrivacyPlan.from_json(folder.text(PLAN), seed=config.seed, cohort_key=stored_cohort_key(folder))
        engine = Engine(
            grid,
            experiment,
            plan=plan,
            strategy=strategy_of(config.strategy),
            spec=trainable.spec,
            values=trainable.initial_values(),
            folder=folder,
            listener=_run_context.listener,
            fleet=fleet,
        )
        if resumes:
            engine.resume()
        else:
            engine.start()
        engine.run()
    if config.trainable.lora.rank:
        blocks = trainable.spec.views(engine.state.values)
        base = config.model.name if is_pretrained(config) else str(base_folder(config))
        guarantee = run_guarantee(plan, experiment)
        save_adapter(trainable.model, blocks, config.trainable.lora, out / "adapter", base=base, guarantee=guarantee)


def default_run_path() -> Path:
    """Return a new folder name below runs/."""
    return Path("runs") / time.strftime("%Y%m%d-%H%M%S")


def plan_of(experiment: Experiment, public: PublicMoments | None = None) -> PrivacyPlan:
    """Return the privacy plan of an experiment; `public` is what `server.public_moments` found.

    Over-selection samples a larger cohort, so the plan's cohorts, simulated and accounted, are the larger ones, and so
    is the divisor.
    """
    config, sampled = experiment.config, experiment.config.fleet.sampled
    return PrivacyPlan.create(
        replace(config.privacy, expected_cohort=sampled(config.privacy.expected_cohort)),
        rounds=config.rounds,
        fleet_size=len(experiment.fleet),
        cohort=sampled(config.fleet.cohort),
        seed=config.seed,
        rows=config.trainable.embedding_rows if config.trainable.embedding_rows.count else None,
        vocabulary_size=experiment.vocabulary.size,
        moments=public.moments if public else None,
        importance=public.importance if public else None,
        size=_most_coordinates(experiment) if MECHANISMS.resolve(config.privacy.mechanism).wants_size else 0,
    )


def _most_coordinates(experiment: Experiment) -> int:
    """Return an upper bound on what a round's device sends, answers to every query included."""
    config, frequencies = experiment.config, experiment.vocabulary.frequencies
    spec = schedule_of(config, build_trainable(structure(experiment), config).spec, frequencies).most_sent
    words = frequencies.size if sampler_of(config.trainable.embedding_rows).selects else 0
    metrics = len(config.privacy.metrics) + 1
    return spec.size + words + len(groups_of(spec)) + metrics + 1  # 1: the clip bit


def _fleet_of(experiment: Experiment, trainable: Trainable) -> Fleet:
    if _run_context.fleet:
        return _run_context.fleet(experiment, trainable)
    if not experiment.config.fleet.is_unconstrained:
        raise ConfigError(
            "fleet.profile and fleet.memory_mb simulate devices, but this run has nodes of its own; "
            "set fleet.profile = 'uniform' and fleet.memory_mb = 0, or use `fedlm simulate`"
        )
    return EveryDevice()


def ensure_base(config: Config, listener: Listener) -> None:
    """Train the public base unless it is in the cache, or the config starts from something else."""
    if starts_from_base(config) and config.model.base == "pretrain" and not has_base(config):
        experiment = Experiment.open(config)
        experiment.check_trainable()  # before minutes of pretraining, not after
        listener({"event": "stage", "text": "training the public base (cached for the next run)"})
        pretrain(config, experiment.vocabulary, listener)


def new_folder(path: Path, experiment: Experiment, trainable: Trainable) -> RunFolder:
    """Make the run folder: the last thing that can fail before the first round."""
    strategy, plan = strategy_of(experiment.config.strategy), plan_of(experiment, public_moments(experiment, trainable))
    check_switches(strategy, trainable.spec, plan, has_canaries=experiment.canaries.count > 0)
    texts = {CONFIG: config_to_toml(experiment.config), PLAN: plan.to_json()}
    secrets = {}
    if not plan.reproducible_cohorts:
        assert plan.cohort_key is not None, "a new plan has a key"
        secrets[COHORT_KEY] = plan.cohort_key.to_text() + "\n"
    return RunFolder.create(path, texts, bytes_needed=16 * trainable.spec.num_bytes, secrets=secrets)
