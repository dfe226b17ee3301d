"""`python -m fedlm` is `fedlm`."""

from __future__ import annotations

import sys
from pathlib import Path

import fedlm


def run() -> int:
    """Run the command line with the working folder, which `-m` puts first on the search path, at its end.

    It may hold a `server.py` of the user's.
    """
    if sys.path and Path(sys.path[0]) == Path.cwd() != Path(fedlm.__file__).parents[1]:
        sys.path.append(sys.path.pop(0))
    from fedlm.cli import main

    return main()


if __name__ == "__main__":
    raise SystemExit(run())
