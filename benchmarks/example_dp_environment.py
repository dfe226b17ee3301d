"""An environment of its own for fastDP, which is on no package index: made from a checkout that the user names."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import venv
from pathlib import Path

import torch
from platformdirs import user_cache_dir


def fastdp_python(checkout: Path) -> Path:
    """Return the interpreter of the environment in the cache folder; the first call makes it, which takes a minute.

    torch, transformers and numpy are of the very versions that run here, so that both sides have the same kernels and
    the same stock modules; scipy is the one further package that the parts of fastDP in use import.

    Arguments:
        checkout: A checkout of awslabs/fast-differential-privacy; pip builds from it and leaves its sources alone.

    Raises:
        SystemExit: It could not be made; pip has said why.
    """
    if not (checkout / "fastDP" / "privacy_engine.py").is_file():
        raise SystemExit(f"--fastdp {checkout}: no checkout of awslabs/fast-differential-privacy; clone it there")
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "numpy")}
    name = f"fastdp-torch-{torch.__version__}-transformers-{versions['transformers']}"
    folder = Path(user_cache_dir("fedlm")) / "benchmarks" / name
    python, finished = folder / "bin" / "python", folder / "installed"
    if not finished.exists():
        print(f"installing fastDP and torch {torch.__version__} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        pinned = [f"torch=={torch.__version__}", *(f"{name}=={version}" for name, version in versions.items())]
        _pip(python, [*pinned, "scipy", "setuptools"])
        _pip(python, ["--no-deps", "--no-build-isolation", str(checkout)])
        finished.touch()
    return python


def _pip(python: Path, arguments: list[str]) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", *arguments]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise SystemExit(f"pip could not install {arguments[-1]}; leave --fastdp out to do without its rows")
