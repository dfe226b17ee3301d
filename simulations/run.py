"""`simulate` and `resume`: open the experiment, start a grid, run the ServerApp on it, write the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flwr.app import Context, RecordDict

from clients.app import app as client_app
from clients.app import share_weights
from clients.host import one_thread
from fedlm.config.load import config_from_toml, config_to_toml
from fedlm.config.paths import with_absolute_paths
from fedlm.config.schema import Config
from fedlm.errors import Interrupted
from fedlm.example_dp.device_budget import device_budget
from fedlm.experiment import Experiment, starts_from_base
from fedlm.pretraining.cache import base_folder, load_base
from fedlm.strategies.contract import strategy_of
from fedlm.training import matmul_backend
from server import app as server
from server.engine import Listener
from server.run_folder import CONFIG, RunFolder, check_writable
from server.run_guarantee import run_guarantee
from simulations.fleet import fleet_maker
from simulations.grids.base import RUN_ID, LocalGrid
from simulations.grids.flower_private import SERVER_NODE_ID
from simulations.grids.inprocess import InProcessGrid
from simulations.grids.node import Scalar
from simulations.grids.ray_grid import RayGrid
from simulations.report import write_report
from simulations.summary import RunSummary, summarise


def simulate(config: Config, out: Path | None, listener: Listener) -> RunSummary:
    """Run an experiment on a simulated fleet.

    Arguments:
        config: The experiment.
        out: The run folder to make; None for a new one below runs/.
        listener: Receives progress events.

    Returns:
        The figures of the finished run.

    Raises:
        FedlmError: Any of `fedlm.errors`; what can be checked is checked before any work starts.
        Interrupted: Ctrl-C or SIGTERM; the run can be resumed.
    """
    config = with_absolute_paths(config)
    path = out or server.default_run_path()
    check_writable(path)
    listener({"event": "stage", "text": f"opening {config.data.corpus}"})
    experiment = Experiment.open(config)
    plan = server.plan_of(experiment)
    strategy_of(config.strategy)
    fleet = fleet_maker(config.fleet.profile)
    for stamp in run_guarantee(plan, experiment).warnings:
        listener({"event": "note", "text": stamp})
    server.ensure_base(config, listener)
    config = _with_device_noise(_with_products(config, listener))
    return _run(config, path, server.RunContext(listener, fleet), resume=False)


def resume(run: Path, listener: Listener) -> RunSummary:
    """Continue a run that was interrupted or killed; a finished one only gets its report again."""
    folder = RunFolder.open(run)
    config = config_from_toml(folder.text(CONFIG))
    return _run(config, run, server.RunContext(listener, fleet_maker(config.fleet.profile)), resume=True)


def pretrain(config: Config, listener: Listener) -> Path:
    """Train and cache this config's base; returns its folder, at once if it is there."""
    config = with_absolute_paths(replace(config, model=replace(config.model, base="pretrain")))
    server.ensure_base(config, listener)
    return base_folder(config)


def _run(config: Config, path: Path, run_context: server.RunContext, *, resume: bool) -> RunSummary:
    server.use_run_context(run_context)
    run_config: dict[str, Scalar] = {
        "config": config_to_toml(config),
        "out": str(path.resolve()),
        "resume": resume,
    }
    try:
        with _grid(config, run_config, run_context.listener) as grid:
            server.app(grid, _server_context(run_config))
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; continue with `fedlm resume {path}`") from error
    write_report(path)
    return summarise(path)


def _with_products(config: Config, listener: Listener) -> Config:
    """Return the config with the backend of matrix products settled, once for the whole run: it decides the last
    bits."""
    wanted = config.execution.products
    with one_thread():
        if wanted == "auto":
            return replace(config, execution=replace(config.execution, products=matmul_backend.choose()))
        if wanted == "bf16":
            plain, rounded = matmul_backend.measure(["fp32", "bf16"])
            ratio = rounded.gigaflops / plain.gigaflops
            listener({"event": "note", "text": f"bf16 products run at {ratio:.2f} times the rate of fp32 here"})
    return config


def _with_device_noise(config: Config) -> Config:
    """Return the config with the noise of `local.example_dp` calibrated, once for all workers."""
    budget = device_budget(config)
    if budget is None:
        return config
    example_dp = replace(config.local.example_dp, noise_multiplier=budget.noise_multiplier)
    return replace(config, local=replace(config.local, example_dp=example_dp))


def _grid(config: Config, run_config: dict[str, Scalar], listener: Listener) -> LocalGrid:
    execution = config.execution
    if execution.grid == "inprocess":
        return InProcessGrid(client_app, num_nodes=execution.workers or 1, run_config=run_config)
    weights = load_base(config) if starts_from_base(config) else {}
    return RayGrid(
        app="clients.app:app",
        setup=share_weights,
        shared=weights,
        num_workers=execution.workers,
        run_config=run_config,
        address=execution.address,
        timeout_s=execution.worker_timeout_s,
        start_timeout_s=execution.start_timeout_s,
        note=lambda text: listener({"event": "stage", "text": text}),
    )


def _server_context(run_config: dict[str, Scalar]) -> Context:
    return Context(
        run_id=RUN_ID, node_id=SERVER_NODE_ID, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
