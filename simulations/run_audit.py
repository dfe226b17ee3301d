"""`audit`: a simulation with canary devices in its fleet, and what they show about its privacy (docs/audit.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import inf, sqrt
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedlm.auditing import AuditReport, Products, TextReport, View, products, scores, strengths
from fedlm.auditing.gaussian_bound import epsilon_of_distance
from fedlm.auditing.phrase_losses import phrase_losses
from fedlm.auditing.report import CanaryCost, make_view
from fedlm.auditing.text import exposures, fresh_phrases, phrase, rank_sum_p
from fedlm.auditing.whitening import whitening
from fedlm.codec import from_text
from fedlm.config.load import config_from_toml
from fedlm.config.schema import Config
from fedlm.config.validate import validate
from fedlm.errors import ConfigError, DataError
from fedlm.experiment import Experiment
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.plan import PrivacyPlan
from fedlm.trainable.build import Trainable
from fedlm.trainable.spec import UpdateSpec, Vector
from server.cohort_key_file import stored_cohort_key
from server.engine import Listener
from server.run_folder import CONFIG, PLAN, RunFolder, write_atomically
from server.run_guarantee import run_guarantee
from simulations.report import write_report
from simulations.run import resume, simulate

AUDIT = "audit.json"
DEFAULT_CANARIES, DEFAULT_TEXT_CANARIES = 200, 20
CROWDED = 10
"""Least coordinates for each canary: with fewer, their directions overlap so much that they hide each other."""

Floats = npt.NDArray[np.float64]


def audit(config: Config, out: Path | None, listener: Listener) -> AuditReport:
    """Run an experiment with canaries and report what they show.

    Arguments:
        config: With `audit.canaries` or `audit.text_canaries` above 0.
        out: The run folder to make; None for a new one below runs/.
        listener: Receives progress events.

    Raises:
        ConfigError: No canaries, or no privacy to audit.
        FedlmError: As `simulations.run.simulate`.
    """
    _check(config)
    return analyse(Path(simulate(config, out, listener).run_dir))


def with_canaries(config: Config) -> Config:
    """Return the config with canaries of both kinds if it asks for none.

    Raises:
        ConfigError: This config cannot have them.
    """
    if config.audit.canaries or config.audit.text_canaries:
        return config
    canaries = replace(config.audit, canaries=DEFAULT_CANARIES, text_canaries=DEFAULT_TEXT_CANARIES)
    config = replace(config, audit=canaries)
    validate(config)
    return config


def audit_run(run: Path, listener: Listener) -> AuditReport:
    """Report on a run that was made with canaries; one that was interrupted is continued first."""
    _check(config_from_toml(RunFolder.open(run).text(CONFIG)))
    return analyse(Path(resume(run, listener).run_dir))


def _check(config: Config) -> None:
    if not config.privacy.enabled:
        raise ConfigError("privacy.enabled = false leaves nothing to audit; set it to true")
    if not (config.audit.canaries or config.audit.text_canaries):
        raise ConfigError("audit.canaries = 0 and audit.text_canaries = 0; set one above 0, for example --canaries 200")


def analyse(run: Path) -> AuditReport:
    """Return the report of a finished run with canaries, and write it to audit.json in the run folder.

    Raises:
        DataError: The folder lacks what an audit needs.
    """
    case = _Case.open(run)
    canaries, k = case.experiment.canaries, case.experiment.canaries.num_gradient
    views, size = case.views() if k else ((), 0)
    report = AuditReport(
        run_dir=str(run),
        guarantee=run_guarantee(case.plan, case.experiment),
        rounds=case.rounds,
        num_canaries=k,
        num_coordinates=size,
        views=views,
        text=case.text() if canaries.num_text else None,
        cost=case.cost(),
        notes=_notes(case, size),
    )
    write_atomically(run / AUDIT, (json.dumps(report.to_fields(), indent=1, allow_nan=False) + "\n").encode())
    write_report(run)  # again: it has a section for what an audit found
    return report


@dataclass(frozen=True, eq=False)
class _Case:
    """A finished run, opened.

    Arguments:
        folder: The run folder.
        experiment: Of the run.
        plan: As stored.
        trainable: The model as it was before round 1.
        values: (P_full,) at the end.
        rounds: T done.
    """

    folder: RunFolder
    experiment: Experiment
    plan: PrivacyPlan
    trainable: Trainable
    values: Vector
    rounds: int

    @classmethod
    def open(cls, run: Path) -> _Case:
        folder = RunFolder.open(run)
        config = config_from_toml(folder.text(CONFIG))
        checkpoint = folder.last_checkpoint()
        num_releases = sum(1 for _ in folder.releases(after=0))
        if checkpoint is None or checkpoint[0] != num_releases or not num_releases:
            done = checkpoint[0] if checkpoint else 0
            raise DataError(f"{run} has {num_releases} releases of {done} rounds in its journal; audit a finished run")
        experiment = Experiment.open(config)
        plan = PrivacyPlan.from_json(folder.text(PLAN), seed=config.seed, cohort_key=stored_cohort_key(folder))
        return cls(folder, experiment, plan, experiment.trainable(), checkpoint[1]["values"], checkpoint[0])

    @property
    def noise_multiplier(self) -> float:
        """z of this fleet's own noise: std in units of the clip norm, of the sum over its own cohort."""
        return self.plan.noise_multiplier * self.plan.cohort / self.plan.expected_cohort

    def views(self) -> tuple[tuple[View, ...], int]:
        """Return the views of gradient canaries, and the coordinates that they rest on."""
        canaries, plan, rounds = self.experiment.canaries, self.plan, self.rounds
        spec, vectors = self._vectors()
        found = products(vectors, canaries.batches(spec), canaries.num_gradient)
        released = Products(found.dots[:rounds], found.gram[:rounds, :rounds])
        moved = Products(found.dots[rounds:], found.gram[rounds:, rounds:])
        members = canaries.members()[: canaries.num_gradient]  # (k,)
        matrix, ones = whitening(plan.mechanism, rounds), np.ones(canaries.num_gradient)
        taken = self._participations()  # (T, k)
        strength = strengths(matrix, taken)  # (k,)
        sampled = plan.epsilon_of_this_fleet(rounds, cohorts_known=False)  # what the first and the last line look at
        unsampled = epsilon_of_distance(float(strength.max()) / self.noise_multiplier, plan.delta)
        everywhere = np.ones((rounds, 1))

        def view(name: str, sees: str, x: Floats, strength: Floats, accounted: float) -> View:
            return make_view(name, sees, x, strength, members, accounted=accounted, delta=plan.delta)

        return (
            view("hidden", "to who sees all releases", scores(released, matrix, everywhere), ones, sampled),
            view(
                "known",
                "to who sees all releases and knows every cohort",
                scores(released, matrix, taken),
                strength,
                inf if plan.reproducible_noise else unsampled,
            ),
            view("model", "to who sees the final model", scores(moved, np.eye(1), np.ones((1, 1))), ones, sampled),
        ), spec.size

    def text(self) -> TextReport:
        """Return the exposure of the text canaries."""
        config, vocabulary, canaries = self.experiment.config, self.experiment.vocabulary, self.experiment.canaries
        numbers = range(canaries.num_gradient, canaries.count)
        held = np.stack([phrase(config, vocabulary, number) for number in numbers])  # (m, L)
        losses = phrase_losses(
            self.trainable,
            self.values,
            np.concatenate([held, fresh_phrases(config, vocabulary)]),
            boundary=vocabulary.boundary_id,
            chunk=config.loss.chunk,
        )
        exposure = exposures(losses[: len(held)], losses[len(held) :])  # (m,)
        members = canaries.members()[canaries.num_gradient :]
        inside, outside = exposure[members], exposure[~members]
        return TextReport(
            num_members=len(inside),
            num_strangers=len(outside),
            candidates=config.audit.phrase_candidates,
            member_exposure=float(inside.mean()) if len(inside) else None,
            stranger_exposure=float(outside.mean()) if len(outside) else None,
            largest_exposure=float(inside.max()) if len(inside) else None,
            p_value=rank_sum_p(inside, outside),
        )

    def cost(self) -> CanaryCost:
        """Return what the canaries cost in the first round."""
        canaries, plan = self.experiment.canaries, self.plan
        num_members = int(canaries.members()[: canaries.num_gradient].sum())
        clip_spec, (_, first) = self._clip_spec(1), next(self.folder.releases(after=0))
        share = plan.cohort / plan.fleet_size
        return CanaryCost(
            fleet_share=canaries.count / plan.fleet_size,
            canary_norm=sqrt(num_members * share) * clip_spec.clip_norm / plan.cohort,
            noise_norm=plan.noise_std(clip_spec) * sqrt(first["mean"].size) * plan.mechanism.noise_growth(plan.cohort),
        )

    def _vectors(self) -> tuple[UpdateSpec, Vector]:
        """Return the coordinates that were ever released, with the releases and the model's change in them (T + 1, P).

        Releases are in units of what one device contributes, and in the coordinates of the clip, so that the noise is
        the same everywhere; a round of fewer coordinates, where canaries are larger in each, counts accordingly.
        """
        full, rows = self.trainable.spec, np.empty(0, np.int64)
        for _, arrays in self.folder.releases(after=0):
            rows = np.union1d(rows, arrays["rows"])
        seen = full.with_rows(rows)
        local = UpdateSpec.build([(block.name, block.kind, block.shape) for block in seen.blocks])
        vectors = np.zeros((self.rounds + 1, seen.size), np.float32)
        for t, arrays in self.folder.releases(after=0):
            round_spec = local.with_rows(np.searchsorted(rows, arrays["rows"]))
            round_spec.scatter(vectors[t - 1], self._in_clip_norms(t, arrays["mean"]))
        vectors[-1] = seen.gather(self.values) - seen.gather(self.trainable.initial_values())
        return seen, vectors

    def _in_clip_norms(self, t: int, mean: Vector) -> Vector:
        clip_spec = self._clip_spec(t)
        vector = mean * np.float32(self.plan.cohort / (clip_spec.clip_norm * sqrt(mean.size)))
        if clip_spec.block_scaling:
            for start, stop, group in clip_spec.block_scaling.spans:
                vector[start:stop] /= np.float32(clip_spec.block_scaling.scales[group])
        return vector

    def _participations(self) -> Floats:
        """Return which gradient canary was sampled when (T, k), 0 or 1."""
        canaries = self.experiment.canaries
        taken = np.zeros((self.rounds, canaries.num_gradient))
        for t in range(1, self.rounds + 1):
            numbers = self.plan.sample_cohort(t) - canaries.first_device
            taken[t - 1, numbers[(numbers >= 0) & (numbers < canaries.num_gradient)]] = 1.0
        return taken

    def _clip_spec(self, t: int) -> ClipSpec:
        return from_text(ClipSpec, self.folder.release_record(t)["clip_spec"], where="clip spec in the journal")


def _notes(case: _Case, size: int) -> tuple[str, ...]:
    """Return what a reader of this audit has to know."""
    plan, canaries = case.plan, case.experiment.canaries
    notes = []
    if canaries.num_gradient * CROWDED > size > 0:
        notes.append(
            f"{canaries.num_gradient:,} canaries in {size:,} coordinates disturb each other: the intervals are too "
            f"narrow; use at most {size // CROWDED:,}"
        )
    if plan.reproducible_noise:
        notes.append("the noise follows from the seed: no finite epsilon is accounted for, so there is no alarm")
    if plan.mimics:
        notes.append("accounted figures are those of this fleet and its own noise, not of the accounted population")
    if not case.experiment.config.fleet.is_unconstrained:
        notes.append("canaries may stay away like other devices; what is found is then less, never more")
    return tuple(notes)
