"""What moves, what travels and what changes in a round: three specs, one and the same unless the strategy differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlm.errors import ConfigError
from fedlm.strategy import Strategy
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
