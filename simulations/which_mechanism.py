"""The mechanisms that a run could have had: compared for its own numbers, and kept in its folder for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedlm.codec import from_text
from fedlm.errors import DataError, OutputError
from fedlm.privacy.mechanisms.compare import EPSILONS, Row, advice, compare
from fedlm.privacy.plan_parameters import PlanParameters
from server.run_folder import PLAN, write_atomically
from simulations.report import write_report
from simulations.run_files import COMPARISON, read_run


@dataclass(frozen=True)
class Comparison:
    """The mechanisms for one fleet.

    Arguments:
        rows: One for each epsilon and mechanism.
        advice: A sentence for each epsilon.
        own: Of the run itself: mechanism, epsilon, prefix RMSE in clip norms, noise multiplier.
        stamps: Of the run, whose fleet and delta all rows have.
    """

    rows: Sequence[Row]
    advice: Sequence[str]
    own: Mapping[str, Any]
    stamps: tuple[str, ...]

    def to_fields(self) -> dict[str, Any]:
        """Return all of it, JSON-ready."""
        rows, stamps = [asdict(row) for row in self.rows], list(self.stamps)
        return {"rows": rows, "advice": list(self.advice), "run": dict(self.own), "stamps": stamps}


def compare_run(run: Path, *, epsilons: Sequence[float] = (), separation: int = 0, max_vectors: int = 0) -> Comparison:
    """Compare the mechanisms for the accounted fleet of a run, write compare.json, and render its report again.

    Arguments:
        run: The run folder.
        epsilons: Beside the run's own; empty: 1, 2, 4 and 8.
        separation: As for `fedlm.privacy.mechanisms.compare.compare`; 0: the run's where it keeps one.
        max_vectors: Likewise.

    Raises:
        DataError: Not a run folder, or a run without privacy.
        OutputError: The folder cannot be written.
    """
    record = read_run(run)
    plan_parameters = _plan_parameters(run)
    rule, epsilon = plan_parameters.mechanism.participation, _target(plan_parameters)
    kept = rule.separation if rule.sampler == "separated" else 0
    rows = compare(
        population=rule.population,
        cohort=rule.cohort,
        rounds=rule.rounds,
        delta=plan_parameters.delta,
        epsilons=sorted({*(epsilons or EPSILONS), epsilon}),
        separation=separation or kept,
        max_vectors=max_vectors,
    )
    found = Comparison(rows, advice(rows), _own(plan_parameters, epsilon), record.stamps)
    path = run / COMPARISON
    try:
        write_atomically(path, (json.dumps(found.to_fields(), indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; make the run folder writable") from error
    write_report(run)
    return found


def _plan_parameters(run: Path) -> PlanParameters:
    try:
        plan_parameters = from_text(PlanParameters, (run / PLAN).read_bytes(), where="stored privacy plan")
    except OSError as error:
        raise DataError(f"{run / PLAN} cannot be read: {error.strerror}; give the --out of a run") from error
    if not plan_parameters.enabled:
        raise DataError(f"{run} ran without privacy, so there is no epsilon to compare at; give a private run")
    return plan_parameters


def _target(plan_parameters: PlanParameters) -> float:
    """Return the budget, or what the noise costs where only its multiplier was given."""
    spent: float = plan_parameters.mechanism.epsilon(
        noise_multiplier=plan_parameters.noise_multiplier,
        num_releases=plan_parameters.rounds,
        delta=plan_parameters.delta,
    )
    return float(plan_parameters.epsilon_target) or spent


def _own(plan_parameters: PlanParameters, epsilon: float) -> dict[str, Any]:
    z, mechanism = plan_parameters.noise_multiplier, plan_parameters.mechanism
    return {
        "mechanism": mechanism.name,
        "epsilon": epsilon,
        "prefix_rmse": z * mechanism.prefix_rmse(),
        "noise_multiplier": z,
    }
