"""The round loop: one for simulation, `flwr run` and real fleets.

A round: sample a cohort, send work, add up exact sums, release one noised mean, make it durable, let the strategy step,
evaluate. Nothing of a round reaches metrics, nodes or the strategy before its release is in the journal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flwr.serverapp import Grid

from fedlm.codec import to_text
from fedlm.experiment import Experiment
from fedlm.losses.evaluation import Score
from fedlm.messages import PartialSum, TrainRequest
from fedlm.privacy.clipping.clipped_sum import ClippedSum, new_sum
from fedlm.privacy.plan import PrivacyPlan
from fedlm.privacy.release import Release
from fedlm.strategies import Strategy, StrategyState
from fedlm.strategies.server_step import ServerState, step
from fedlm.trainable.spec import UpdateSpec, Vector
from fedlm.training.grouped.assignment import group_devices
from server.broadcast import Broadcaster
from server.cohort_key_file import forget_cohort_key
from server.device_log import DeviceLog
from server.evaluation import Evaluation
from server.noise_keys import NoiseKeys
from server.participation import Fleet
from server.resume import (
    check_unchanged,
    experiment_hash,
    privacy_scalars,
    release_arrays,
    replayed,
    state_arrays,
    state_of,
)
from server.round import Round, RoundOpener
from server.round_lines import CohortReport, RunLines, json_number, now
from server.run_folder import NOTHING, RunFolder
from server.run_guarantee import devices_and_users, privacy_figures, run_guarantee
from server.transport.dispatch import Dispatcher

Listener = Callable[[dict[str, object]], None]


class Engine:
    """Runs the rounds of one experiment.

    Arguments:
        grid: Any Flower grid whose nodes run `clients.app`.
        experiment: Config, vocabulary and data.
        plan: The privacy plan.
        strategy: The aggregation strategy.
        spec: Every block that the server may change.
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
        self._folder, self._listener = folder, listener
        self._noise_keys = NoiseKeys(folder.path)
        plan.keep_keys(self._noise_keys)
        self._rounds = RoundOpener(plan, strategy, experiment, fleet, spec)
        self._state = ServerState(strategy.init(spec, values), self._rounds.first_state())
        self._broadcaster = Broadcaster(str(folder.path), spec, self._rounds)
        self._dispatcher = Dispatcher(grid, self._config.execution.worker_timeout_s, self._lost)
        self._lines = RunLines(self._config, plan, self._rounds, run_guarantee(plan, experiment).warnings)
        self._device_log = DeviceLog(folder.path, enabled=self._config.fleet.device_log)
        self._described_fleet = {**fleet.describe(), **devices_and_users(experiment)}
        self._evaluation = Evaluation(experiment, self._dispatcher)
        self._diagnostics: dict[str, float | None] = {}
        self._round_number = self._num_released = 0
        self._state_is_whole = True

    @property
    def state(self) -> StrategyState:
        """The strategy's current state."""
        return self._state.model

    def start(self) -> None:
        """Open the ledger, store the base as round 0 and score it."""
        sent = self._rounds.specs(1, self._state.privacy).sends
        privacy = privacy_figures(self._plan, self._experiment)
        self._folder.ledger(self._lines.start(sent, privacy, self._described_fleet))
        self._checkpoint()
        self._folder.metric(self._lines.evaluated(None, self._diagnostics, self._score()))

    def resume(self) -> None:
        """Go back to the newest state on disk and replay the journal; released rounds are never released again."""
        checkpoint = self._folder.last_checkpoint()
        if checkpoint is None:  # killed before the base was stored: nothing was released
            self._folder.rewind(NOTHING)
            self._rewind_keys(0)
            self.start()
            return
        done, arrays, meta = checkpoint
        check_unchanged(self._folder, self._config, meta["experiment"], self._described_fleet)
        self._state, self._diagnostics = state_of(arrays, meta), meta["diagnostics"]
        if self._folder.is_finished():  # its cohorts are forgotten, and its ledger is closed
            return
        for t in range(1, done + 1):
            self._rounds.count(t, self._state.privacy)
        for state, diagnostics in replayed(self._folder, self._rounds, self._strategy, self._plan, self._state):
            self._state = state
            self._note(diagnostics)
        done = self._round_number = self._num_released = self.state.num_steps
        if done < self._config.rounds:  # else they may be gone already: nothing more will be released
            self._rewind_keys(done)
        self._device_log.rewind(done)
        self._mend_lines(done)
        self._folder.ledger({"event": "resume", "round": done, "time": now()})

    def run(self) -> None:
        """Train the rounds that are left; an interrupt leaves a checkpoint.

        Raises:
            BudgetExceededError: Before the round that would exceed the privacy budget.
            KeyboardInterrupt: After the checkpoint was written.
        """
        if self._folder.is_finished():
            self._forget_secrets()
            return
        try:
            for t in range(self.state.num_steps + 1, self._config.rounds + 1):
                self._plan.check_release(t - 1)
                self._run_round(t)
        except BaseException as error:
            if self._state_is_whole:  # else the last checkpoint and the journal have all that counts
                self._checkpoint()
            self._end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        self._checkpoint()
        self._end("finished")
        self._forget_secrets()

    def _forget_secrets(self) -> None:
        """Delete what only a run that goes on needs; after its end is in the ledger, which a resumed run goes by."""
        self._noise_keys.forget()
        is_audit = self._experiment.canaries.count > 0  # an audit asks when its canaries were sampled
        if not (is_audit or self._config.privacy.keep_cohort_key):
            forget_cohort_key(self._folder)

    def _run_round(self, t: int) -> None:
        started, self._round_number = time.monotonic(), t
        opened = self._rounds.open(t, self._state.privacy)
        total, report = self._collect(opened)
        release, record = self._release(opened, total, report, started)
        self._step(opened, release)
        self._close(opened, record)

    def _collect(self, opened: Round) -> tuple[ClippedSum, CohortReport]:
        """Let the nodes train the round's devices; returns the exact sum and what the simulation saw."""
        training, clip = opened.participation.training, opened.clip
        total, report = new_sum(clip, opened.specs.sends.size), CohortReport(len(training), clip.clip_norm)

        def take(partial: PartialSum) -> None:
            total.add_arrays(partial.total, {"clip_norm": clip.clip_norm, "num_devices": partial.num_devices})

        with ThreadPoolExecutor(1) as side:
            side.submit(self._plan.epsilon, opened.number)  # for the metrics; counted while the nodes train
            exchange_spec = self._broadcaster.training(opened, self._state)
            for index, reply in self._dispatcher.train(exchange_spec, self._requests(opened), take):
                report.add(index, reply)
                self._lines.peak_mb = max(self._lines.peak_mb, reply.peak_mb)
                event = {"event": "device_done", "round": opened.number, "done": report.done, "total": len(training)}
                self._listener(event)
        report.figures = self._dispatcher.figures()
        self._note_workers()
        if warning := report.warning(opened.number) or opened.participation.warning():
            self._listener({"event": "note", "text": warning})
        return total, report

    def _requests(self, opened: Round) -> list[TrainRequest]:
        """Cut the cohort into work items of whole groups; the groups depend on the cohort alone, never on the nodes."""
        training = opened.participation.training
        num_tokens = self._experiment.store.num_tokens[self._experiment.fleet[training]]  # (U,)
        groups = group_devices(num_tokens, self._config)
        return self._dispatcher.work_items(training, num_tokens, groups, to_text(opened.clip))

    def _release(
        self, opened: Round, total: ClippedSum, report: CohortReport, started: float
    ) -> tuple[Release, dict[str, Any]]:
        """Noise the sum and make the release durable, with what metrics and ledger will say of the round."""
        t = opened.number
        self._device_log.append(opened.participation)
        release = self._plan.release(total, t, opened.specs.sends)
        seconds = time.monotonic() - started
        record = {
            "metrics": self._lines.metrics(opened, release, report, self._state.privacy, seconds),
            "ledger": self._lines.ledger(opened, total, report, seconds),
            "clip_spec": to_text(opened.clip),
        }
        self._folder.write_release(t, release_arrays(release, opened.row_ids), record)
        self._num_released = t
        return release, record

    def _step(self, opened: Round, release: Release) -> None:
        self._state_is_whole = False  # a strategy may write into the state's arrays
        self._state, diagnostics = step(
            self._strategy, self._plan, self._state, release, clip=opened.clip, changes=opened.specs.changes
        )
        self._state_is_whole = True
        self._note(diagnostics)

    def _note(self, diagnostics: Mapping[str, float]) -> None:
        self._diagnostics = {name: json_number(float(value)) for name, value in diagnostics.items()}

    def _close(self, opened: Round, record: dict[str, Any]) -> None:
        """Write the round's lines, a checkpoint and an evaluation where they are due."""
        t = opened.number
        for line in record["ledger"]:
            self._folder.ledger(line)
        if t % self._config.execution.checkpoint_every == 0 and t < self._config.rounds:
            self._checkpoint()
        line = self._lines.evaluated(
            record["metrics"], self._diagnostics, self._score() if self._evaluation.is_due(t) else None
        )
        self._folder.metric(line)
        self._listener(self._lines.announcement(line, len(opened.participation.training)))

    def _score(self) -> Score:
        return self._evaluation.score(self._broadcaster.evaluation(self._state))

    def _mend_lines(self, done: int) -> None:
        """Bring metrics and ledger to the last released round, which may have died before it wrote them."""
        kept = self._folder.rewind(done)
        self._lines.continue_after(float(kept[-1]["seconds"]) if kept else 0.0)
        if kept and kept[-1]["round"] == done:
            return
        self._folder.rewind(done - 1)
        record = self._folder.release_record(done) if done else {"metrics": None, "ledger": []}
        for line in record["ledger"]:
            self._folder.ledger(line)
        score = self._score() if self._evaluation.is_due(done) else None
        self._folder.metric(self._lines.evaluated(record["metrics"], self._diagnostics, score))

    def _rewind_keys(self, last_round: int) -> None:
        """Throw away the noise keys of rounds that were never released."""
        if self._plan.enabled and self._plan.mechanism.keeps_noise:
            self._noise_keys.rewind(last_round)

    def _checkpoint(self) -> None:
        meta = {
            "num_steps": self.state.num_steps,
            "experiment": experiment_hash(self._config),
            "blocks": [{"name": b.name, "kind": b.kind, "shape": list(b.shape)} for b in self._spec.blocks],
            "privacy": privacy_figures(self._plan, self._experiment),
            "privacy_state": privacy_scalars(self._state),
            "diagnostics": self._diagnostics,  # the round's line may not have been written yet
        }
        is_audit = self._experiment.canaries.count > 0  # an audit looks at every release
        self._folder.write_checkpoint(self.state.num_steps, state_arrays(self._state), meta, keep_journal=is_audit)

    def _end(self, status: str) -> None:
        self._folder.ledger(self._lines.end(status, self.state.num_steps, self._num_released))

    def _lost(self, node: int, reason: str) -> None:
        self._note_workers()
        line = {"event": "work_lost", "round": self._round_number, "worker": str(node), "reason": reason}
        self._folder.ledger(line)
        self._listener({"event": "note", "text": f"round {self._round_number}: {reason}; its devices are done again"})

    def _note_workers(self) -> None:
        """Write to the ledger what has happened to the workers of a grid that keeps a record of them."""
        for event in self._dispatcher.take_events():
            self._folder.ledger({**event, "round": self._round_number})
