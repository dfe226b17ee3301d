"""The privacy side of a run's rounds: the plan, what it has learnt from releases, who took part, the rows it chose.

Everything here follows from the seed, from public data and from releases, so a resumed run arrives at the same state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlm.config.schema import OptionValues
from fedlm.example_dp.device_budget import device_budget
from fedlm.experiment import Experiment
from fedlm.privacy.adaptation import PrivacyState, Released
from fedlm.privacy.clipper import Clipper
from fedlm.privacy.plan import PrivacyPlan
from fedlm.trainable.rows import row_set
from fedlm.trainable.spec import RowIds, UpdateSpec, Vector
from server.noise_keys import NoiseKeys
from server.turnout import Bytes, RoundTask

_ANSWER, _SCORES = "answer.", "privacy.word_scores"


class RoundPrivacy:
    """Serves the engine of one run.

    Arguments:
        plan: The privacy plan.
        experiment: For the public row sets.
        folder: Where the keys of correlated noise are kept.
        spec: The full spec of what trains.
    """

    def __init__(self, plan: PrivacyPlan, experiment: Experiment, folder: Path, spec: UpdateSpec) -> None:
        self.plan = plan
        self._experiment, self._spec = experiment, spec
        self._keys = NoiseKeys(folder)
        self._ledger = plan.new_ledger()
        self._budget = device_budget(experiment.config)
        self._state = plan.first_state(spec.with_rows(self.rows(1)))
        plan.keep_keys(self._keys)

    def rows(self, t: int) -> RowIds:
        """Return the row set of a round: public, or what earlier releases have chosen."""
        config = self._experiment.config.trainable.embedding_rows
        if self.plan.enabled and 0 < self.plan.adaptation.selection_rounds < t:
            chosen = self.plan.selected_rows(self._state)
            if len(chosen):
                return chosen
            config = replace(
                config, sampler="top_k", options=OptionValues()
            )  # no word stands out of the noise: the public guess
        frequencies = self._experiment.vocabulary.frequencies
        return row_set(config, frequencies, seed=self._experiment.config.seed, round_number=t)

    def clipper(self, t: int, spec: UpdateSpec) -> Clipper:
        """Return what the devices of the next round clip with."""
        return self.plan.clipper(self._state, spec, t)

    def task(self, t: int, cohort: RowIds, spec: UpdateSpec, bytes_down: Bytes) -> RoundTask:
        """Return what a round asks of its devices."""
        clipper = self.clipper(t, spec)
        encoded_bytes = clipper.encoder.num_bytes if clipper.encoder else 0
        return RoundTask(t, cohort, spec, bytes_down, clipper.num_answers, encoded_bytes)

    def record(self, t: int, cohort: RowIds) -> None:
        """Enter a cohort into the ledger.

        Raises:
            BudgetExceededError: A device would come too early or too often.
        """
        self._ledger.record(t, cohort)

    def spent(self, cohort: RowIds) -> npt.NDArray[np.bool_]:
        """Return which devices (U,) of the recorded round's cohort have spent their own budget (`local.example_dp`)."""
        if self._budget is None:
            return np.zeros(len(cohort), np.bool_)
        return np.asarray(self._ledger.participations(cohort) > self._budget.max_rounds)

    def absorb(self, t: int, spec: UpdateSpec, values: Vector, released: Released) -> None:
        """Learn from a release; `values` (P,) are the model's before it."""
        self._state = self.plan.next_state(self._state, spec, t, values=values, released=released)

    def replayed(self, t: int, spec: UpdateSpec, arrays: Mapping[str, Any]) -> Released:
        """Return the release that the journal holds."""
        answers = {name.removeprefix(_ANSWER): a for name, a in arrays.items() if name.startswith(_ANSWER)}
        return Released(arrays["mean"], answers, self.plan.noise_std(self.clipper(t, spec)))

    def noise_std(self, t: int, spec: UpdateSpec) -> float:
        """Return the standard deviation of a coordinate of the next round's mean."""
        return self.plan.noise_std(self.clipper(t, spec))

    def metrics(self, released: Released) -> dict[str, Any]:
        """Return what a round's metrics say of its privacy: all of it released or public."""
        state = self._state
        allocated = {"scales": list(state.allocation.scales)} if state.allocation else {}
        metrics = self.plan.adaptation.metric_means(released) if self.plan.enabled else {}
        named = {name: value if np.isfinite(value) else None for name, value in metrics.items()}
        clip_norm = {"clip_norm": state.clip_norm} if self.plan.enabled else {}
        return {**clip_norm, **allocated, **({"dp_metrics": named} if named else {})}

    def realised(self, num_releases: int) -> dict[str, Any]:
        """Return the participation that the ledger saw and the epsilon that follows from it."""
        seen = {"separation": self._ledger.separation, "max_participations": self._ledger.max_participations}
        if not self.plan.enabled or not num_releases:
            return {}
        realised = self.plan.realised_epsilon(num_releases, **seen)
        return {**seen, **({"epsilon_realised": realised} if np.isfinite(realised) else {})}

    def arrays(self) -> dict[str, Any]:
        """Return the state's arrays for a checkpoint."""
        return {} if self._state.word_scores is None else {_SCORES: self._state.word_scores}

    def text(self) -> str:
        """Return the rest of the state for a checkpoint."""
        return self._state.to_text() if self.plan.enabled else ""

    def restore(self, arrays: Mapping[str, Any], text: str) -> None:
        """Go back to the state of a checkpoint."""
        if text:
            self._state = PrivacyState.from_text(text, arrays.get(_SCORES))

    def rewind_keys(self, last_round: int) -> None:
        """Throw away the noise keys of rounds that were never released."""
        if self.plan.enabled and self.plan.mechanism.keeps_noise:
            self._keys.rewind(last_round)

    def forget_keys(self) -> None:
        """Delete the noise keys: the run has ended."""
        self._keys.forget()


def release_arrays(released: Released) -> dict[str, Any]:
    """Return a release as the arrays that the journal holds."""
    return {"mean": released.mean, **{_ANSWER + name: answer for name, answer in released.answers.items()}}
