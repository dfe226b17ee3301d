"""The round loop: one for simulation, `flwr run` and real fleets.

A round: sample a cohort, send work, add up exact sums, release one noised mean, make it durable, let the strategy step,
evaluate. Nothing of a round reaches metrics, nodes or the strategy before its release is in the journal.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from fedlm.config.load import config_hash
from fedlm.config.schema import Config, ExecutionConfig
from fedlm.data.batching import evaluation_users
from fedlm.errors import ConfigError, DataError
from fedlm.experiment import Experiment
from fedlm.flower_records import Records, from_records, to_records
from fedlm.losses.evaluation import Score
from fedlm.losses.metrics import evaluation_figures
from fedlm.messages import (
    EMPTY_IDS,
    EMPTY_VECTOR,
    FROM_SCRATCH,
    Broadcast,
    EvaluateReply,
    EvaluateRequest,
    PartialSum,
    TrainReply,
    TrainRequest,
)
from fedlm.privacy.adaptation import Released
from fedlm.privacy.clipper import Clipper
from fedlm.privacy.clipping import ClippedSum
from fedlm.privacy.plan import PrivacyPlan
from fedlm.randomness import round_key, seed_key, stream
from fedlm.strategy import Release, Strategy, StrategyState
from fedlm.trainable.spec import RowIds, UpdateSpec, Vector
from fedlm.training.groups import group_devices
from server.claim import devices_and_users, privacy_figures
from server.device_log import DeviceLog
from server.dispatch import Dispatcher
from server.exchange import Order
from server.payload import DownloadMeter
from server.round_privacy import RoundPrivacy, release_arrays
from server.rounds import CohortReport, json_number
from server.run_folder import CONFIG, RunFolder
from server.turnout import Fleet, Turnout

Listener = Callable[[dict[str, object]], None]
USERS_PER_EVALUATION = 8


class Engine:
    """Runs the rounds of one experiment.

    Arguments:
        grid: Any Flower grid whose nodes run `clients.app`.
        experiment: Config, vocabulary and data.
        plan: The privacy plan.
        strategy: The aggregation strategy.
        spec: The full spec of what trains.
        values: (P_full,) the base's values.
        folder: The run folder.
        listener: Receives progress events.
        fleet: Decides which devices of a cohort take part.
    """

    def __init__(
        self,
        grid: Grid,
        experiment: Experiment,
        *,
        plan: PrivacyPlan,
        strategy: Strategy,
        spec: UpdateSpec,
        values: Vector,
        folder: RunFolder,
        listener: Listener,
        fleet: Fleet,
    ) -> None:
        self._config = experiment.config
        self._experiment, self._plan, self._strategy, self._spec = experiment, plan, strategy, spec
        self._privacy = RoundPrivacy(plan, experiment, folder.path, spec)
        self._folder, self._listener, self._fleet = folder, listener, fleet
        self._dispatcher = Dispatcher(grid, self._config.execution.worker_timeout_s, self._lost)
        self._state = strategy.init(spec, values)
        self._device_tokens = experiment.store.num_tokens[experiment.fleet]  # (N,)
        self._meter = DownloadMeter(spec, plan.fleet_size, self._config.rounds)
        self._device_log = DeviceLog(folder.path, enabled=self._config.fleet.device_log)
        self._eval_requests = self._plan_evaluation()
        self._bytes_up = self._bytes_down = 0
        self._seconds_before, self._started = 0.0, time.monotonic()
        self._round, self._num_released, self._peak_mb = 0, 0, 0.0
        self._diagnostics: dict[str, float | None] = {}
        self._state_is_whole = True
        self._rows = lru_cache(maxsize=4)(self._privacy.rows)  # of round t, wanted several times a round

    @property
    def state(self) -> StrategyState:
        """The current server state."""
        return self._state

    def start(self) -> None:
        """Open the ledger, store the base as round 0 and score it."""
        self._folder.ledger(self._start_event())
        self._checkpoint()
        self._folder.metric(self._metric_line(None, self._evaluate()))

    def resume(self) -> None:
        """Go back to the newest state on disk and replay the journal; released rounds are never released again."""
        checkpoint = self._folder.last_checkpoint()
        if checkpoint is None:  # killed before the base was stored: nothing was released
            self._privacy.rewind_keys(0)
            self.start()
            return
        done, arrays, meta = checkpoint
        slots = {name.removeprefix("slot."): a for name, a in arrays.items() if name.startswith("slot.")}
        self._state = StrategyState(arrays["values"], slots, meta["num_steps"])
        self._privacy.restore(arrays, meta["privacy_state"])
        self._check_unchanged(meta["experiment"])
        for t in range(1, done + 1):
            self._meter_round(t)
        for t, released in self._folder.releases(after=done):
            self._meter_round(t)
            self._replay(t, released)
            done = t
        self._round = self._num_released = done
        self._privacy.rewind_keys(done)
        self._device_log.rewind(done)
        self._mend_lines(done)
        self._folder.ledger({"event": "resume", "round": done, "time": _now()})

    def _replay(self, t: int, arrays: dict[str, Any]) -> None:
        """Step with the release of the journal, whatever the sum was."""
        spec = self._spec_of(t)
        released = self._privacy.replayed(t, spec, arrays)
        self._step(t, self._privacy.clipper(t, spec).new_sum(spec.size), lambda total: released)

    def _mend_lines(self, done: int) -> None:
        """Bring metrics and ledger to the last released round, which may have died before it wrote them."""
        kept = self._folder.rewind(done)
        self._seconds_before = float(kept[-1]["seconds"]) if kept else 0.0
        if kept and kept[-1]["round"] == done:
            return
        self._folder.rewind(done - 1)
        record = self._folder.release_record(done) if done else {"metrics": None, "ledger": []}
        for line in record["ledger"]:
            self._folder.ledger(line)
        self._folder.metric(self._metric_line(record["metrics"], self._evaluate() if self._due(done) else None))

    def run(self) -> None:
        """Train the rounds that are left; Ctrl-C leaves a checkpoint.

        Raises:
            BudgetExceededError: Before the round that would exceed the privacy budget.
            KeyboardInterrupt: After the checkpoint was written.
        """
        try:
            for t in range(self._state.num_steps + 1, self._config.rounds + 1):
                self._plan.check_release(t - 1)
                self._train_round(t)
        except BaseException as error:
            if self._state_is_whole:  # else the last checkpoint and the journal have all that counts
                self._checkpoint()
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self._folder.ledger(self._end_event(status))
            raise
        self._checkpoint()
        self._privacy.forget_keys()
        self._folder.ledger(self._end_event("finished"))

    def _train_round(self, t: int) -> None:
        self._round, started = t, time.monotonic()
        turnout = self._meter_round(t)
        training = turnout.training
        with ThreadPoolExecutor(1) as side:
            side.submit(self._plan.epsilon, t)  # cached for the metrics: the accountant works while the nodes train
            total, report = self._collect(t, training, turnout.task.spec)
        if warning := report.warning(t) or turnout.warning():
            self._listener({"event": "note", "text": warning})
        self._device_log.append(turnout)
        record: dict[str, Any] = {}

        def release(total: ClippedSum) -> Released:
            released = self._plan.release(total, t)
            seconds = time.monotonic() - started
            metrics = self._round_metrics(t, released, report, turnout, seconds)
            up, down = int(turnout.bytes_up.sum()), int(turnout.bytes_down.sum())
            *failures, summary = report.ledger_lines(t, up, down, seconds)
            summary |= {"reclipped": total.num_reclipped} if total.num_reclipped else {}
            ledger = [*failures, turnout.complete(summary)]
            record.update(metrics=metrics, ledger=ledger, clipper=total.clipper.to_text())
            self._folder.write_release(t, {**release_arrays(released), "rows": self._rows(t)}, record)
            self._num_released = t
            return released

        self._step(t, total, release)
        for line in record["ledger"]:
            self._folder.ledger(line)
        if t % self._config.execution.checkpoint_every == 0 and t < self._config.rounds:
            self._checkpoint()
        score = self._evaluate() if self._due(t) else None
        line = self._metric_line(record["metrics"], score)
        self._folder.metric(line)
        self._announce(t, line, len(training) / max(time.monotonic() - started, 1e-9))

    def _step(self, t: int, total: ClippedSum, release: Callable[[ClippedSum], Released]) -> None:
        state = replace(self._state, total=None)
        state = self._strategy.accumulate(state, total)
        values = self._spec_of(t).gather(state.values)  # before a strategy writes into them
        released: list[Released] = []

        def noted(total: ClippedSum) -> Vector:
            released.append(release(total))
            return released[-1].mean.copy()

        self._state_is_whole = False  # a strategy may write into the state's arrays
        self._state, diagnostics = self._strategy.finish(state, Release(self._spec_of(t), noted))
        self._check_step(t, released=bool(released))
        self._privacy.absorb(t, self._spec_of(t), values, released[0])
        self._state_is_whole = True
        self._diagnostics = {name: json_number(float(value)) for name, value in diagnostics.items()}

    def _check_step(self, t: int, *, released: bool) -> None:
        """Refuse a step that breaks the contract, before anything is stored: a resumed run would release twice."""
        state, size = self._state, self._spec.size
        problem = ""
        if not released:
            problem = "without asking for release.mean; call it once"
        elif state.num_steps != t:
            problem = f"with num_steps = {state.num_steps}; finish must return num_steps = {t}, one more each round"
        elif state.values.shape != (size,) or state.values.dtype != np.float32:
            found = f"{state.values.dtype} {state.values.shape}"
            problem = f"with values of {found}; finish must return float32 ({size},)"
        if problem:
            raise ConfigError(f"strategy.kind = {self._config.strategy.kind!r} finished round {t} {problem}")

    def _collect(self, t: int, cohort: RowIds, spec: UpdateSpec) -> tuple[ClippedSum, CohortReport]:
        """Let the nodes train the cohort; returns the exact sum and what the simulation saw."""
        clipper = self._privacy.clipper(t, spec)
        total, report = clipper.new_sum(spec.size), CohortReport(len(cohort), clipper.clip_norm)

        def take(partial: PartialSum) -> None:
            fields = {"clip_norm": clipper.clip_norm, "num_devices": partial.num_devices}
            total.add_arrays(partial.total, fields)

        pieces = self._pieces(cohort, clipper)
        for index, records in self._dispatcher.train(self._order("train", t - 1), pieces, take):
            reply = from_records(TrainReply, "reply", records)
            report.add(index, reply)
            self._peak_mb = max(self._peak_mb, reply.peak_mb)
            self._listener({"event": "device_done", "round": t, "done": report.done, "total": len(cohort)})
        report.figures = self._dispatcher.figures()
        self._note_workers()
        return total, report

    def _pieces(self, cohort: RowIds, clipper: Clipper) -> list[TrainRequest]:
        """Cut the cohort into pieces of whole groups; the groups depend on the cohort alone, never on the nodes."""
        num_tokens = self._device_tokens[cohort]  # (U,)
        groups = group_devices(num_tokens, self._config)
        return self._dispatcher.pieces(cohort, num_tokens, groups, clipper.to_text())

    def _order(self, kind: str, version: int) -> Order:
        broadcast = self._broadcast(version, whole=False)
        return Order(kind, f"{version}", broadcast, lambda: self._broadcast(version, whole=True))

    def _broadcast(self, version: int, *, whole: bool) -> Records:
        """Return the records of the broadcast that takes nodes to `version` and opens the round after it."""
        next_round = version + 1
        rows, patch, source = EMPTY_IDS, EMPTY_VECTOR, version
        if whole:
            patch, source = self._state.values, FROM_SCRATCH
        elif version > 0:
            rows, source = self._rows(version), version - 1
            patch = self._spec_of(version).gather(self._state.values)
        message = Broadcast(
            run=str(self._folder.path),
            from_version=source,
            to_version=version,
            patch_rows=rows,
            patch=patch,
            row_ids=self._rows(next_round),
            key=round_key(self._config.seed, next_round),
            noise_std=self._privacy.noise_std(next_round, self._spec_of(next_round)),
        )
        return to_records("broadcast", message)

    def _plan_evaluation(self) -> list[EvaluateRequest]:
        rng = stream(seed_key(self._config.seed), "evaluation")
        users = evaluation_users(self._experiment.store, self._config.data.max_eval_tokens, rng)
        step = USERS_PER_EVALUATION
        return [EvaluateRequest(users[i : i + step]) for i in range(0, len(users), step)]

    def _evaluate(self) -> Score:
        """Score the held-out users; parts are added in a fixed order, so the figure does not depend on the workers."""
        parts: dict[int, Score] = {}
        order = self._order("evaluate", self._state.num_steps)
        for index, records in self._dispatcher.evaluate(order, self._eval_requests):
            reply = asdict(from_records(EvaluateReply, "reply", records))
            del reply["stale"]
            parts[index] = Score(**reply)
        return sum((parts[i] for i in range(len(parts))), Score())

    def _due(self, t: int) -> bool:
        every = self._config.execution.eval_every
        return t in (0, self._config.rounds) or (every > 0 and t % every == 0)

    def _spec_of(self, t: int) -> UpdateSpec:
        return self._spec.with_rows(self._rows(t))

    def _meter_round(self, t: int) -> Turnout:
        """Sample the cohort, see who takes part, count the bytes: from seed and earlier rounds alone, so resumable."""
        cohort, rows, spec = self._plan.sample_cohort(t), self._rows(t), self._spec_of(t)
        self._privacy.record(t, cohort)
        task = self._privacy.task(t, cohort, spec, self._meter.download(cohort, rows))
        turnout = self._fleet.turnout(task).without(self._privacy.spent(cohort))
        self._meter.visited(cohort[turnout.visited], t)
        self._meter.changed(rows, t)
        self._bytes_up += int(turnout.bytes_up.sum())
        self._bytes_down += int(turnout.bytes_down.sum())
        return turnout

    def _check_unchanged(self, experiment: str) -> None:
        """Refuse to go on with another config or fleet: the ledger would have cohorts that never were."""
        if experiment != _identity(self._config):
            raise DataError(
                f"{self._folder.path / CONFIG} changed since the run began; restore it ([execution] alone may change)"
            )
        known = [line["fleet"] for line in self._folder.lines("ledger.jsonl") if "fleet" in line]
        if known and known[0] != self._describe_fleet():
            profile = self._config.fleet.profile
            raise DataError(f"fleet.profile = {profile!r} changed since the run began; restore the file it names")

    def _describe_fleet(self) -> dict[str, Any]:
        return {**self._fleet.describe(), **devices_and_users(self._experiment)}

    def _checkpoint(self) -> None:
        slots = {f"slot.{name}": array for name, array in self._state.slots.items()}
        arrays = {"values": self._state.values, **slots, **self._privacy.arrays()}
        meta = {
            "num_steps": self._state.num_steps,
            "experiment": _identity(self._config),
            "blocks": [{"name": b.name, "kind": b.kind, "shape": list(b.shape)} for b in self._spec.blocks],
            "privacy": self._plan.figures(),
            "privacy_state": self._privacy.text(),
        }
        is_audit = self._experiment.canaries.count > 0  # an audit looks at every release
        self._folder.write_checkpoint(self._state.num_steps, arrays, meta, keep_journal=is_audit)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _lost(self, node: int, reason: str) -> None:
        self._note_workers()
        self._folder.ledger({"event": "work_lost", "round": self._round, "worker": str(node), "reason": reason})
        self._listener({"event": "note", "text": f"round {self._round}: {reason}; its devices are done again"})

    def _note_workers(self) -> None:
        """Write to the ledger what has happened to the workers of a grid that keeps a record of them."""
        for event in self._dispatcher.take_events():
            self._folder.ledger({**event, "round": self._round})

    def _round_metrics(
        self, t: int, released: Released, report: CohortReport, turnout: Turnout, seconds: float
    ) -> dict[str, Any]:
        virtual = {"virtual_hours": turnout.time.end_s / 3600} if turnout.time else {}
        return {
            "round": t,
            "seconds": round(self._seconds(), 3),
            "round_seconds": round(seconds, 3),
            "devices": report.num_trained,
            "epsilon": json_number(self._plan.epsilon(t)),
            "update_norm": float(np.linalg.norm(released.mean)),
            **self._privacy.metrics(released),
            "megabytes_up": self._bytes_up / 1e6,
            "megabytes_down": self._bytes_down / 1e6,
            "non_private": report.non_private(),
            **virtual,
        }

    def _metric_line(self, metrics: dict[str, Any] | None, score: Score | None) -> dict[str, Any]:
        line = metrics or {"round": 0, "seconds": round(self._seconds(), 3), "devices": 0, "epsilon": 0.0}
        scores = {
            name: getattr(score, name, None) for name in ("perplexity", "bits_per_byte", "log_z_mean", "log_z_std")
        }
        further = evaluation_figures(self._config.evaluation, score.metrics) if score and score.metrics else {}
        return {**self._diagnostics, **line, **scores, **({"evaluation": further} if further else {})}

    def _announce(self, t: int, line: dict[str, Any], devices_per_second: float) -> None:
        event = {name: line[name] for name in ("perplexity", "epsilon")}
        megabytes = line["megabytes_up"] + line["megabytes_down"]
        self._listener(
            {"event": "round", "round": t, "rounds": self._config.rounds, **event, "megabytes": megabytes,
             "devices_per_second": devices_per_second}
        )  # fmt: skip

    def _start_event(self) -> dict[str, Any]:
        spec = self._spec_of(1)
        return {
            "event": "start",
            "time": _now(),
            "versions": _versions(),
            "machine": f"{platform.system()} {platform.machine()}, {platform.processor() or 'cpu'}",
            "config_hash": config_hash(self._config),
            "clip_norm": json_number(self._plan.clip_norm),
            "blocks": [{"kind": b.kind, "name": b.name, "bytes": 4 * b.size} for b in spec.blocks],
            "privacy": privacy_figures(self._plan, self._experiment),
            "fleet": self._describe_fleet(),
        }

    def _end_event(self, status: str) -> dict[str, Any]:
        done = self._state.num_steps
        return {"event": "end", "status": status, "round": done, **self._privacy.realised(self._num_released),
                "peak_device_mb": round(self._peak_mb, 1), "seconds": round(self._seconds(), 3)}  # fmt: skip


def _identity(config: Config) -> str:
    """Return the hash of all that a run's releases depend on, but for where and how fast they are computed."""
    return config_hash(replace(config, execution=ExecutionConfig()))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("fedlm", "torch", "flwr", "ray", "peft", "dp-accounting"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
