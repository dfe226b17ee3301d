"""`import fedlm` is light and offers what it says; `python -m fedlm` is the command line; functions do as verbs do."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

import fedlm
from fedlm.environment import QUIET_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
OFFERED = {
    "Config", "FedlmError", "PrivacyPlan", "Release", "Strategy", "UpdateSpec", "audit", "check_strategy", "finetune",
    "load_config", "plan", "resume", "simulate",
}  # fmt: skip
TINY = [
    "rounds=1", "data.corpus=synthetic", "synthetic.users=40", "synthetic.tokens_per_user=40", "synthetic.classes=16",
    "vocabulary.size=300", "model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.base=random",
    "trainable.lora.rank=0", "trainable.dense=['*']", "trainable.embedding_rows.count=50", "loss.negatives=32",
    "fleet.cohort=8", "privacy.delta=1e-3", "execution.grid=inprocess", "execution.products=fp32",
]  # fmt: skip
# typer below 0.21, which Flower asks for, imports names that click 8.5 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")


def python(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter that finds this tree and nothing of the quiet environment."""
    clean = {name: value for name, value in os.environ.items() if name not in QUIET_ENVIRONMENT}
    environment = {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, check=False
    )


def test_the_door_offers_what_it_says_and_nothing_else(tmp_path: Path) -> None:
    program = "import json, fedlm; print(json.dumps([dir(fedlm), fedlm.__all__, sorted(fedlm._HOMES)]))"
    done = python("-c", program, cwd=tmp_path)
    listed, stated, homes = json.loads(done.stdout)
    assert set(stated) == set(listed) == set(homes) == OFFERED
    assert stated == sorted(stated)
    with pytest.raises(AttributeError, match="'fedlm' has no attribute 'simulat'; it offers Config, "):
        fedlm.simulat  # noqa: B018


@pytest.mark.parametrize("name", sorted(OFFERED))
def test_every_offered_name_is_the_one_of_the_module_that_defines_it(name: str) -> None:
    found = getattr(fedlm, name)
    assert (found.__module__, found.__name__) == (fedlm._HOMES[name], name)
    assert getattr(importlib.import_module(fedlm._HOMES[name]), name) is found
    assert found.__doc__
    # Importing a module `fedlm.NAME` would put it in the place of the function.
    assert not [path for path in (ROOT / "fedlm").iterdir() if path.stem == name]


def test_type_checkers_see_the_same_homes() -> None:
    tree = ast.parse((ROOT / "fedlm" / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {a.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert seen == fedlm._HOMES


def test_importing_it_and_looking_around_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys, fedlm, fedlm.api\nfedlm.simulate, fedlm.load_config, fedlm.FedlmError, dir(fedlm)\n"
        "print([m for m in ('torch', 'ray', 'flwr', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = python("-c", program, cwd=tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_star_import_and_the_quiet_environment_of_a_fresh_process(tmp_path: Path) -> None:
    program = (
        "import json, os\nfrom fedlm import *\n"
        "try:\n    resume('nowhere')\nexcept FedlmError as error:\n    print(error)\n"
        f"print(json.dumps([os.environ.get(name) for name in {sorted(QUIET_ENVIRONMENT)}]))"
    )
    done = python("-c", program, cwd=tmp_path, RAY_USAGE_STATS_ENABLED="1")
    assert done.returncode == 0, done.stderr
    error, variables = done.stdout.splitlines()
    assert error.startswith("nowhere is not a run folder")
    wanted = [QUIET_ENVIRONMENT[name] for name in sorted(QUIET_ENVIRONMENT)]
    assert json.loads(variables) == [
        "1" if name == "RAY_USAGE_STATS_ENABLED" else value
        for name, value in zip(sorted(QUIET_ENVIRONMENT), wanted, strict=True)
    ]


def test_python_m_fedlm_is_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text("raise SystemExit('the wrong server')")
    done = python("-m", "fedlm", "config", "check", "--set", "rounds=3", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ok ")
    wrong = python("-m", "fedlm", "config", "check", "--set", "rounsd=3", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "fedlm: error: unknown key 'rounsd'; did you mean 'rounds'?\n"
    listed = python("-m", "fedlm", "strategies", cwd=tmp_path)
    assert (listed.returncode, "fedavg" in listed.stdout) == (0, True), listed.stderr


def test_functions_return_what_verbs_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also in a thread of its own, where Python lets nobody set signal handlers."""
    config = fedlm.load_config(None, [*TINY, f"data.cache_dir={tmp_path}"])
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(fedlm.simulate(config, tmp_path / "run")))
    thread.start()
    thread.join()
    summary = found[0]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "round 1/1" in shown.err

    from fedlm.cli import main

    assert main(["resume", str(tmp_path / "run"), "--json", "--quiet"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(summary).items()} == printed
    events: list[str] = []
    assert fedlm.resume(str(tmp_path / "run"), lambda event: events.append(str(event["event"]))) == summary
    assert capsys.readouterr() == ("", "")


def test_a_plan_is_what_the_verb_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, f"data.cache_dir={tmp_path}"]
    forecast = fedlm.plan(fedlm.load_config(None, words))

    from fedlm.cli import main
    from fedlm.cli.output import print_json
    from fedlm.privacy.guarantee import to_dict

    file = tmp_path / "empty.toml"
    file.write_text("")
    assert main(["plan", str(file), "--json", *(w for word in words for w in ("--set", word))]) == 0
    printed = json.loads(capsys.readouterr().out)
    guarantee = to_dict(forecast.guarantee)
    returned = {name: value for name, value in asdict(forecast).items() if name != "guarantee"} | guarantee
    print_json(returned)  # a device without limits has infinities, which JSON lacks
    assert json.loads(capsys.readouterr().out) == printed
    assert printed["coordinates"] > 0


def test_an_audit_needs_no_numbers_of_canaries() -> None:
    from simulations.run_audit import with_canaries

    config = fedlm.load_config(None, ["fleet.cohort=8"])
    assert (with_canaries(config).audit.canaries, with_canaries(config).audit.text_canaries) == (200, 20)
    some = fedlm.load_config(None, ["audit.text_canaries=3"])
    assert with_canaries(some) is some


def test_errors_are_those_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(fedlm.FedlmError, match=r"finetune\.train names no file"):
        fedlm.finetune(fedlm.load_config(None), tmp_path / "run")
    with pytest.raises(fedlm.FedlmError, match="leaves nothing to audit"):
        fedlm.audit(fedlm.load_config(None, ["privacy.enabled=false"]), tmp_path / "run")
    with pytest.raises(fedlm.FedlmError, match=r"config file 'missing\.toml' does not exist"):
        fedlm.load_config("missing.toml")


def test_sigterm_ends_a_run_from_python_as_it_ends_the_verb(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, fedlm\n"
        "from fedlm.errors import Interrupted\n"
        "def listener(event):\n"
        "    if event['event'] == 'round':\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        f"config = fedlm.load_config(None, {[*TINY, 'rounds=2', f'data.cache_dir={tmp_path}']})\n"
        "try:\n    fedlm.simulate(config, 'run', listener)\n"
        "except Interrupted as error:\n    print(error)\n"
        "print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, fedlm.resume('run', lambda event: None).rounds)\n"
    )
    done = python("-c", program, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "interrupted; continue with `fedlm resume run`\nTrue 2\n"), done.stderr
