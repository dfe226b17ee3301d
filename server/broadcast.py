"""What nodes are told: what changed in the round before, and the round that opens.

A patch holds the blocks that the server may have changed, whether devices sent them or not. A node that missed a round
gets every value once.
"""

from __future__ import annotations

from fedlm.flower_records import Records, to_records
from fedlm.messages import EMPTY_IDS, EMPTY_VECTOR, FROM_SCRATCH, Broadcast
from fedlm.strategies.server_step import ServerState
from fedlm.trainable.spec import RowIds, UpdateSpec
from server.round import Round, RoundOpener
from server.transport.exchange import ExchangeSpec


class Broadcaster:
    """Makes what the exchanges of a run share.

    Arguments:
        run: Names the run to the nodes.
        spec: Every block that the server may change.
        rounds: For the specs of rounds that are over.
    """

    def __init__(self, run: str, spec: UpdateSpec, rounds: RoundOpener) -> None:
        self._run, self._spec, self._rounds = run, spec, rounds

    def training(self, opened: Round, state: ServerState) -> ExchangeSpec:
        """Return what messages that ask to train for a round share; `state` is that before it."""
        return self._exchange_spec("train", state, opened.noise_std, opened)

    def evaluation(self, state: ServerState) -> ExchangeSpec:
        """Return what messages that ask to score the model of a state share."""
        next_round = state.model.num_steps + 1
        return self._exchange_spec("evaluate", state, self._rounds.noise_std(next_round, state.privacy), None)

    def _exchange_spec(self, kind: str, state: ServerState, noise_std: float, opened: Round | None) -> ExchangeSpec:
        def records(*, whole: bool) -> Records:
            return to_records("broadcast", self._broadcast(state, noise_std, opened, whole=whole))

        return ExchangeSpec(kind, f"{state.model.num_steps}", records(whole=False), lambda: records(whole=True))

    def _broadcast(self, state: ServerState, noise_std: float, opened: Round | None, *, whole: bool) -> Broadcast:
        version, blocks, rows, patch = state.model.num_steps, list[str](), EMPTY_IDS, EMPTY_VECTOR
        if whole:
            patch = state.model.values
        elif version > 0:
            changed = self._rounds.specs(version, state.privacy).changes
            patch, rows, blocks = changed.gather(state.model.values), _rows(changed), self._names(changed, self._spec)
        return Broadcast(
            run=self._run,
            from_version=FROM_SCRATCH if whole else max(version - 1, 0),
            to_version=version,
            patch_blocks=blocks,
            patch_rows=rows,
            patch=patch,
            moves=self._names(opened.specs.moves, self._spec) if opened else [],
            sends=self._names(opened.specs.sends, opened.specs.moves) if opened else [],
            row_ids=opened.row_ids if opened else EMPTY_IDS,
            key=opened.key if opened else b"",
            noise_std=noise_std,
        )

    @staticmethod
    def _names(some: UpdateSpec, among: UpdateSpec) -> list[str]:
        """Return the blocks' names; none where they are all that there are."""
        return [] if some.names == among.names else list(some.names)


def _rows(spec: UpdateSpec) -> RowIds:
    assert spec.row_ids is not None, "a round's spec has a row set, if an empty one"
    return spec.row_ids
