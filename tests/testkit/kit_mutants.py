"""All wrong implementations: each by one mistake that somebody could make, and the check that must catch it.

`python tests/testkit/kit_mutants.py` prints the table of docs/testkit.md.
"""

from __future__ import annotations

from importlib import import_module

from kit_registry import MUTANTS

THEMES = ("listed", "sums", "noise", "state", "cohorts", "strategies", "plans")
for theme in THEMES:
    import_module(f"kit_mutants_{theme}")


def table() -> str:
    """Return the Markdown table of all mutants."""
    rows = [f"| {i} | {name} | {check} |" for i, (name, (_, check)) in enumerate(MUTANTS.items(), start=1)]
    return "\n".join(["| | mutant | caught by |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
