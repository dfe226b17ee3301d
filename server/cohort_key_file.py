"""cohort_key: the secret that decides who is sampled, in a file for the operator's eyes alone.

A resumed run has to draw the cohorts that it drew before, so the key outlives the process: it is on disk before the
folder is a run folder, hence before round 1. Nobody needs it once the run has ended, but for an audit, which asks when
its canaries were sampled, and for an operator who sets `privacy.keep_cohort_key`; else it is deleted then. A run whose
cohorts follow from the seed (`privacy.reproducible_cohorts`) has no such file.
"""

from __future__ import annotations

from fedlm.config.load import config_from_toml
from fedlm.errors import DataError
from fedlm.privacy.sampling.cohort_key import CohortKey
from server.run_folder import CONFIG, RunFolder, sync_folder

NAME = "cohort_key"


def stored_cohort_key(folder: RunFolder) -> CohortKey | None:
    """Return the key of a run; None where the run does without: it has ended, or its cohorts follow from the seed.

    Raises:
        DataError: The file of a run that has not ended is missing or damaged: others would be sampled than were.
    """
    path = folder.path / NAME
    if path.exists():
        try:
            return CohortKey.from_text(path.read_text(encoding="ascii").strip())
        except ValueError:  # not ASCII, or not a key; from None: the text is in the error
            raise DataError(f"{path} is damaged; restore it, or start a new run") from None
    if folder.is_finished() or config_from_toml(folder.text(CONFIG)).privacy.reproducible_cohorts:
        return None
    raise DataError(
        f"{path} is missing: without it other devices would be sampled than those that were; restore it, or start a "
        "new run"
    )


def forget_cohort_key(folder: RunFolder) -> None:
    """Delete the key: the run has ended, which its ledger says, and samples nobody any more."""
    folder.sync_ledger()  # with neither key nor end a run could not be resumed
    (folder.path / NAME).unlink(missing_ok=True)
    sync_folder(folder.path)
