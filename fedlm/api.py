"""The verbs of the command line as functions: `fedlm.simulate`, `resume`, `finetune`, `audit`, `plan`.

They do what the verbs do, in the same quiet environment and with the same errors (`fedlm.errors`), and return objects
where the verbs print. Like `fedlm.cli` this module may import the other three packages, and it does so inside functions
alone, so that importing it costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fedlm.environment import set_quiet_environment
from fedlm.plugins import refuse_shadows, search_in

if TYPE_CHECKING:
    from fedlm.auditing import AuditReport
    from fedlm.config.schema import Config
    from fedlm.finetuning.run import FinetuneSummary
    from fedlm.planning.forecast import Device
    from fedlm.planning.run_forecast import Forecast
    from simulations.summary import RunSummary

Listener: TypeAlias = Callable[[dict[str, object]], None]
Folder: TypeAlias = str | os.PathLike[str]


def simulate(config: Config, out: Folder | None = None, listener: Listener | None = None) -> RunSummary:
    """Train over a simulated fleet.

    Arguments:
        config: The experiment, from `load_config`.
        out: The run folder to make; None: a new one below runs/.
        listener: Receives progress events (`fedlm.cli.progress` lists them); None: they are shown on standard error.

    Returns:
        The figures of the finished run, `run_dir` among them.

    Raises:
        FedlmError: Any of `fedlm.errors`.
        Interrupted: Ctrl-C or SIGTERM; `resume` continues the run.
    """
    with _listening(listener) as listen:
        from simulations.run import simulate

        return simulate(config, _path(out), listen)


def resume(run: Folder, listener: Listener | None = None) -> RunSummary:
    """Continue the run of a run folder.

    Arguments:
        run: The folder; a finished run only gets its report again.
        listener: As for `simulate`.

    Returns:
        The figures of the finished run.

    Raises:
        FedlmError: As `simulate`; DataError where `run` is no run folder.
    """
    with _listening(listener) as listen:
        from simulations.run import resume

        return resume(Path(run), listen)


def finetune(config: Config, out: Folder | None = None, listener: Listener | None = None) -> FinetuneSummary:
    """Fine-tune a model on private examples of this machine, with example-level differential privacy.

    Arguments:
        config: The experiment; its `finetune.train` names the file of examples.
        out: The run folder to make; None: a new one below runs/.
        listener: As for `simulate`.

    Returns:
        The figures of the finished run.

    Raises:
        FedlmError: Any of `fedlm.errors`.
    """
    with _listening(listener) as listen:
        from fedlm.finetuning.run import finetune

        return finetune(config, _path(out), listen)


def audit(config: Config, out: Folder | None = None, listener: Listener | None = None) -> AuditReport:
    """Train with canary devices in the fleet and hold what they show against the accounted epsilon.

    Arguments:
        config: The experiment; one that asks for no canaries gets those of `fedlm audit`.
        out: The run folder to make; None: a new one below runs/.
        listener: As for `simulate`.

    Returns:
        What was found; `alarms` is empty unless the run is less private than it claims.

    Raises:
        FedlmError: As `simulate`; ConfigError where there is no privacy to audit.
    """
    with _listening(listener) as listen:
        from simulations.run_audit import audit, with_canaries

        return audit(with_canaries(config), _path(out), listen)


def plan(config: Config, device: Device | None = None, *, max_noise: float | None = None) -> Forecast:
    """Forecast payload, memory, noise and time before any training, and which settings fit a device.

    Arguments:
        config: The experiment; its section [privacy] says what the noise is calibrated to.
        device: What devices can do (`fedlm.planning.forecast.Device`); None: no limit to memory and time.
        max_noise: The largest noise-to-signal of a round that still fits; None: that of `fedlm plan`.

    Returns:
        The forecast, with the run's guarantee.

    Raises:
        FedlmError: Any of `fedlm.errors`.
    """
    _prepare()
    from fedlm.experiment import Experiment
    from fedlm.planning.forecast import Device
    from fedlm.planning.run_forecast import forecast
    from fedlm.planning.settings import MOST_NOISE
    from server.app import plan_of
    from server.run_guarantee import run_guarantee

    experiment = Experiment.open(config)
    terms = plan_of(experiment)
    return forecast(
        experiment,
        terms,
        run_guarantee(terms, experiment),
        device or Device(),
        most_noise=MOST_NOISE if max_noise is None else max_noise,
    )


@contextmanager
def _listening(listener: Listener | None) -> Iterator[Listener]:
    """Give the caller's listener, or one that shows progress as the verbs do; interrupts are those of the verbs."""
    _prepare()
    from fedlm.cli.progress import interruptible, progress

    with progress(quiet=False, json=False) if listener is None else interruptible(listener) as listen:
        yield listen


def _prepare() -> None:
    """Do what the command line does before a verb."""
    set_quiet_environment()
    refuse_shadows()
    search_in([Path()])


def _path(folder: Folder | None) -> Path | None:
    return None if folder is None else Path(folder)
