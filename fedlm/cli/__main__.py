"""`python -m fedlm.cli` is `fedlm`."""

from __future__ import annotations

from fedlm.__main__ import run

if __name__ == "__main__":
    raise SystemExit(run())
