"""An environment of its own for pfl 0.6, which pins an older dp-accounting than fedlm."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import torch
from platformdirs import user_cache_dir

PFL = "pfl==0.6.*"


def pfl_python() -> Path:
    """Return the interpreter of the environment in the cache folder; the first call makes it, which takes a minute.

    torch is installed together with pfl in the very version that runs here, build suffix included, so that both
    sides have the same kernels and no other build arrives.

    Raises:
        SystemExit: It could not be made; pip has said why.
    """
    folder = Path(user_cache_dir("fedlm")) / "benchmarks" / f"pfl-0.6-torch-{torch.__version__}"
    python = folder / "bin" / "python"
    finished = folder / "installed"
    if not finished.exists():
        print(f"installing {PFL} and torch {torch.__version__} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", PFL, f"torch=={torch.__version__}", "numpy"]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise SystemExit(f"pip could not install {PFL}; name an interpreter that has it with --pfl-python")
        finished.touch()
    return python
