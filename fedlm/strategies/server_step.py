"""One step of the server: what a round's release makes of the strategy's and of the plan's state.

The engine, the replay of a journal and the privacy test kit all take this step, so that a resumed run and an examined
one are the run itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedlm.errors import ConfigError
from fedlm.privacy.adaptive.rule import AdaptiveState
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.plan import PrivacyPlan
from fedlm.privacy.release import Release
from fedlm.strategies.contract import Strategy, StrategyState
from fedlm.trainable.spec import UpdateSpec, Vector


@dataclass(frozen=True, eq=False)
class ServerState:
    """What the server knows after some rounds; all of it follows from public data and releases.

    Arguments:
        model: The strategy's state.
        privacy: What the plan has learnt.
    """

    model: StrategyState
    privacy: AdaptiveState


def step(
    strategy: Strategy, plan: PrivacyPlan, state: ServerState, release: Release, *, clip: ClipSpec, changes: UpdateSpec
) -> tuple[ServerState, dict[str, float]]:
    """Return the state after a round, and the strategy's diagnostics.

    Arguments:
        strategy, plan: Of the run.
        state: Before the round; a strategy may write into its arrays, so it is not to be used again.
        release: Of the round.
        clip: What the round's devices clipped with.
        changes: What the strategy says that it may change.

    Raises:
        ConfigError: The strategy broke its contract: a wrong type, shape, or a block that it did not name.
    """
    full, name = changes.full or changes, type(strategy).__name__
    values, rest = release.spec.gather(state.model.values), _checksums(state.model.values, full, changes)
    # What is learnt for the next round comes first: a strategy may write into the mean.
    privacy = plan.next_state(state.privacy, release, clip=clip, values=values)
    stepped = strategy.step(state.model, release)
    if not (isinstance(stepped, tuple) and len(stepped) == 2 and isinstance(stepped[0], StrategyState)):
        raise ConfigError(f"{name}.step returned {type(stepped).__name__}; it must return (StrategyState, diagnostics)")
    model, diagnostics = stepped
    if model.values.shape != (full.size,) or model.values.dtype != np.float32:
        found = f"{model.values.dtype} {model.values.shape}"
        raise ConfigError(f"{name}.step returned values of {found}; they must be float32 ({full.size},)")
    now = _checksums(model.values, full, changes)
    if changed := sorted(block for block, total in now.items() if rest[block] != total):
        raise ConfigError(
            f"{name}.step changed {changed[0]!r}, which its `changes` does not name (or rows outside the round's set): "
            "devices would go on with the old values"
        )
    return ServerState(replace(model, num_steps=state.model.num_steps + 1), privacy), diagnostics


def _checksums(values: Vector, full: UpdateSpec, changes: UpdateSpec) -> dict[str, int]:
    """Return the sum of the bit patterns of what a round may not change, by block: a slip shows, an attack need not."""
    views, named = full.views(values), {block.name: block for block in changes.blocks}
    totals: dict[str, int] = {}
    for name, view in views.items():
        block = named.get(name)
        if block is None or (block.kind == "rows" and changes.row_ids is not None):
            inside = view[changes.row_ids] if block is not None else view[:0]
            totals[name] = (_bits(view) - _bits(inside)) % 2**64
    return totals


def _bits(array: Vector) -> int:
    return int(np.ascontiguousarray(array).view(np.uint32).sum(dtype=np.uint64))
