"""What moves, what travels and what changes in a round: three specs, one and the same unless the strategy differs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedlm.errors import ConfigError
from fedlm.strategies.contract import Strategy
from fedlm.trainable.spec import RowIds, UpdateSpec


@dataclass(frozen=True, eq=False)
class RoundSpecs:
    """Which blocks take part in a round, with the rows of its set; see `Strategy`.

    Arguments:
        moves: What devices train.
        sends: What they send.
        changes: What the server may change, and so what nodes are sent afterwards.
    """

    moves: UpdateSpec
    sends: UpdateSpec
    changes: UpdateSpec

    @classmethod
    def of(cls, strategy: Strategy, full: UpdateSpec, round_number: int, row_ids: RowIds) -> RoundSpecs:
        """Return a round's specs, one object where they are the same.

        Raises:
            ConfigError: The strategy names a block that is not there, or sends what does not train.
        """
        found: dict[tuple[str, ...], UpdateSpec] = {}
        tables = {block.name for block in full.row_blocks}

        def spec(role: str, names: Sequence[str], among: UpdateSpec) -> UpdateSpec:
            known = [block.name for block in among.blocks]
            if unknown := sorted(set(names) - set(known)):
                raise ConfigError(
                    f"{type(strategy).__name__}.{role} of round {round_number} names the block {unknown[0]!r}; "
                    f"there are {', '.join(known)}"
                )
            chosen = tuple(name for name in known if name in set(names))
            if not chosen:
                raise ConfigError(f"{type(strategy).__name__}.{role} of round {round_number} names no block")
            if 0 < len(tables.intersection(chosen)) < len(tables):
                raise ConfigError(
                    f"{type(strategy).__name__}.{role} of round {round_number} names some of the tables "
                    f"{', '.join(sorted(tables))}; their rows go together, name all of them or none"
                )
            if chosen not in found:
                found[chosen] = full.with_rows(row_ids, chosen)
            return found[chosen]

        moves = spec("moves", strategy.moves(round_number, full), full)
        sends = spec("sends", strategy.sends(round_number, full), moves)
        return cls(moves, sends, spec("changes", strategy.changes(round_number, full), full))


@dataclass(frozen=True, eq=False)
class Schedule:
    """The specs of all rounds of a run, as far as their sizes go.

    Arguments:
        full: Every block that the server may change.
        rounds: Of rounds 1 to T, all with the row set of one of them.
    """

    full: UpdateSpec
    rounds: tuple[RoundSpecs, ...]

    @classmethod
    def of(cls, strategy: Strategy, full: UpdateSpec, num_rounds: int, row_ids: RowIds) -> Schedule:
        """Return the schedule of a run.

        Raises:
            ConfigError: As `RoundSpecs.of`.
        """
        known: dict[tuple[tuple[str, ...], ...], RoundSpecs] = {}
        rounds = []
        for t in range(1, num_rounds + 1):
            names = strategy.moves(t, full), strategy.sends(t, full), strategy.changes(t, full)
            if names not in known:
                known[names] = RoundSpecs.of(strategy, full, t, row_ids)
            rounds.append(known[names])
        return cls(full, tuple(rounds))

    @property
    def most_trained(self) -> UpdateSpec:
        """What devices train in the round that trains most."""
        return max((specs.moves for specs in self.rounds), key=lambda spec: spec.size)

    @property
    def most_sent(self) -> UpdateSpec:
        """What devices send in the round that sends most."""
        return max((specs.sends for specs in self.rounds), key=lambda spec: spec.size)

    def mean_bytes_by_kind(self) -> dict[str, float]:
        """Return what a device sends in a round, in the mean over the rounds, by kind of block."""
        totals: dict[str, int] = {}
        for specs in self.rounds:
            for kind, num_bytes in specs.sends.bytes_by_kind().items():
                totals[kind] = totals.get(kind, 0) + num_bytes
        return {kind: total / len(self.rounds) for kind, total in totals.items()}

    def changed_bytes(self, num_rounds: float) -> int:
        """Return the bytes of the blocks outside the tables that the last so many rounds changed."""
        names: set[str] = set()
        for specs in self.rounds[-max(1, math.ceil(num_rounds)) :]:
            names.update(specs.changes.names)
        return sum(4 * block.size for block in self.full.blocks if block.kind != "rows" and block.name in names)
