"""From a run folder back to the server's state: a checkpoint, and the journalled releases after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fedlm.codec import join, split
from fedlm.config.load import config_hash
from fedlm.config.schema import Config, ExecutionConfig
from fedlm.errors import DataError
from fedlm.privacy.adaptive.rule import AdaptiveState
from fedlm.privacy.plan import PrivacyPlan
from fedlm.privacy.release import Release
from fedlm.strategies import Strategy, StrategyState
from fedlm.strategies.server_step import ServerState, step
from fedlm.trainable.spec import RowIds, UpdateSpec
from server.round import RoundOpener
from server.run_folder import CONFIG, RunFolder

_ANSWER, _SLOT, _PRIVACY = "answer.", "slot.", "privacy."
Arrays = Mapping[str, Any]


def release_arrays(release: Release, row_ids: RowIds) -> dict[str, Any]:
    """Return a release as the arrays that the journal holds."""
    answers = {_ANSWER + name: answer for name, answer in release.answers.items()}
    return {"mean": release.mean, **answers, "rows": row_ids}


def release_of(arrays: Arrays, spec: UpdateSpec, noise_std: float) -> Release:
    """Return the release that the journal holds."""
    answers = {name.removeprefix(_ANSWER): array for name, array in arrays.items() if name.startswith(_ANSWER)}
    return Release(spec, arrays["mean"], answers, noise_std)


def state_arrays(state: ServerState) -> dict[str, Any]:
    """Return the arrays of a state for a checkpoint."""
    slots = {_SLOT + name: array for name, array in state.model.slots.items()}
    learnt = {_PRIVACY + name: array for name, array in split(state.privacy)[0].items()}
    return {"values": state.model.values, **slots, **learnt}


def privacy_scalars(state: ServerState) -> dict[str, Any]:
    """Return what the plan has learnt, without its arrays, JSON-ready."""
    return split(state.privacy)[1]


def state_of(arrays: Arrays, meta: Mapping[str, Any]) -> ServerState:
    """Return the state of a checkpoint.

    Raises:
        DataError: Not such a state.
    """
    slots = {name.removeprefix(_SLOT): array for name, array in arrays.items() if name.startswith(_SLOT)}
    learnt = {name.removeprefix(_PRIVACY): array for name, array in arrays.items() if name.startswith(_PRIVACY)}
    model = StrategyState(arrays["values"], slots, meta["num_steps"])
    return ServerState(model, join(AdaptiveState, learnt, meta["privacy_state"], where="stored privacy state"))


def replayed(
    folder: RunFolder, rounds: RoundOpener, strategy: Strategy, plan: PrivacyPlan, state: ServerState
) -> Iterator[tuple[ServerState, dict[str, float]]]:
    """Yield state and diagnostics after each journalled round that `state` does not know; none is released again."""
    for t, arrays in folder.releases(after=state.model.num_steps):
        opened = rounds.open(t, state.privacy)
        release = release_of(arrays, opened.specs.sends, opened.noise_std)
        state, diagnostics = step(strategy, plan, state, release, clip=opened.clip, changes=opened.specs.changes)
        yield state, diagnostics


def experiment_hash(config: Config) -> str:
    """Return the hash of all that a run's releases depend on, but for where and how fast they are computed."""
    return config_hash(replace(config, execution=ExecutionConfig()))


def check_unchanged(folder: RunFolder, config: Config, stored_hash: str, fleet: Mapping[str, Any]) -> None:
    """Refuse to go on with another config or fleet: the ledger would have cohorts that never were.

    Raises:
        DataError: What to restore.
    """
    if stored_hash != experiment_hash(config):
        raise DataError(
            f"{folder.path / CONFIG} changed since the run began; restore it ([execution] alone may change)"
        )
    known = [line["fleet"] for line in folder.lines("ledger.jsonl") if "fleet" in line]
    if known and known[0] != dict(fleet):
        raise DataError(
            f"fleet.profile = {config.fleet.profile!r} changed since the run began; restore the file it names"
        )
