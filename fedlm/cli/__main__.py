"""`python -m fedlm.cli` is `fedlm`."""

from __future__ import annotations

import sys
from pathlib import Path

import fedlm


def _working_folder_last() -> None:
    """Move the working folder, which `-m` puts first on the search path, to its end: it may hold a `server.py`."""
    if sys.path and Path(sys.path[0]) == Path.cwd() != Path(fedlm.__file__).parents[1]:
        sys.path.append(sys.path.pop(0))


if __name__ == "__main__":
    _working_folder_last()
    from fedlm.cli import main

    raise SystemExit(main())
