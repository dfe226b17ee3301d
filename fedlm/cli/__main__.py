"""`python -m fedlm.cli` is `fedlm`."""

from __future__ import annotations

from fedlm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
