"""The command line as its users meet it: real processes, their output streams and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedlm.cli import main
from fedlm.cli.runs import _print_summary
from fedlm.config import config_hash, load_config
from fedlm.config.keys import keys
from fedlm.environment import QUIET_ENVIRONMENT
from simulations.summary import RunSummary

ROOT = Path(__file__).resolve().parents[2]

# typer below 0.21, which Flower asks for, imports names that click 8.5 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")


def fedlm(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedlm.cli", *words],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.toml"
    path.write_text("seed = 5\n[trainable]\nlora = { rank = 4 }\n")
    return str(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("simulat", "No such command 'simulat'"),
        ("--frobnicate", "--frobnicate"),
        ("config", "Missing command; see `fedlm config --help`"),
        ("config check --set", "requires an argument"),
        ("config check --set seed", '--set "seed" is not allowed; expected KEY=VALUE'),
        ("config check /no/such.toml", "config file '/no/such.toml' does not exist"),
        ("simulate /no/such.toml --json", "config file '/no/such.toml' does not exist"),
        ("pretrain /no/such.toml", "config file '/no/such.toml' does not exist"),
        ("report /no/such/run", "/no/such/run"),
        ("compare /no/such/run", "/no/such/run"),
        ("compare", "Missing argument"),
        ("privacy epsilon", "Missing option '--population'"),
        (
            "privacy epsilon --population 10 --cohort 11 --noise-multiplier 1 --rounds 1 --delta 0.1",
            "--cohort 11",
        ),
        ("privacy epsilon --population 10 --cohort 1 --noise-multiplier nan --rounds 1 --delta 0.1", "nan"),
        ("privacy epsilon --population 10 --cohort 1 --noise-multiplier 0 --rounds 1 --delta 0.1", "0<x<inf"),
        ("privacy calibrate --epsilon 1 --population 10 --cohort 1 --rounds 1 --delta 1", "0<x<1"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    words: str, message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in QUIET_ENVIRONMENT:  # so that what main sets is undone
        monkeypatch.setenv(name, os.environ.get(name, ""))
    assert main(words.split()) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert error.startswith("fedlm: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_process_ends_with_the_exit_code_of_its_error(config: str) -> None:
    done = fedlm("config", "check", config, "--set", "trainable.lora.rnak=4", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    message = "unknown key 'trainable.lora.rnak'; did you mean 'trainable.lora.rank'?"
    assert done.stderr == f"fedlm: error: {message}\n"


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        ("BudgetExceededError('epsilon 3 > 2')", 3, "fedlm: error: epsilon 3 > 2\n"),
        ("WorkerError('no worker\\nleft')", 1, "fedlm: error: no worker left\n"),
        ("OutputError('no space')", 1, "fedlm: error: no space\n"),
        ("Interrupted('stopped')", 130, "fedlm: error: stopped\n"),
        ("KeyboardInterrupt()", 130, "fedlm: error: interrupted\n"),
    ],
)
def test_every_error_of_the_tree_has_its_exit_code(raised: str, code: int, message: str) -> None:
    done = python(
        "import fedlm.cli, fedlm.cli.app\nfrom fedlm.errors import *\n"
        f"@fedlm.cli.app.app.command()\ndef fail():\n    raise {raised}\n"
        "raise SystemExit(fedlm.cli.main(['fail']))"
    )
    assert (done.returncode, done.stderr) == (code, message)


def test_an_unforeseen_error_keeps_its_traceback() -> None:
    done = python(
        "import fedlm.cli, fedlm.cli.app\n"
        "@fedlm.cli.app.app.command()\ndef fail():\n    {}['here']\n"
        "raise SystemExit(fedlm.cli.main(['fail']))"
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert done.stderr.endswith("KeyError: 'here'\n")


def test_a_broken_pipe_inside_the_work_is_not_taken_for_the_reader_of_the_output() -> None:
    done = python(
        "import fedlm.cli, fedlm.cli.app\n"
        "@fedlm.cli.app.app.command()\ndef fail():\n    raise BrokenPipeError('a worker is gone')\n"
        "raise SystemExit(fedlm.cli.main(['fail']))"
    )
    assert done.returncode == 1
    assert "BrokenPipeError: a worker is gone" in done.stderr


@pytest.mark.parametrize(
    ("words", "unbuffered"),
    [
        ("--help", ""),
        ("config show {config}", ""),
        ("config show {config} --json", ""),
        ("config show {config} --json", "1"),
    ],
)
def test_a_reader_that_leaves_is_no_error(words: str, unbuffered: str, config: str) -> None:
    command = [sys.executable, "-m", "fedlm.cli", *words.format(config=config).split()]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_ctrl_c_ends_with_130() -> None:
    code = (
        "import fedlm.cli, fedlm.cli.app, time\n"
        "@fedlm.cli.app.app.command()\ndef wait():\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "raise SystemExit(fedlm.cli.main(['wait']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"fedlm: error: interrupted\n"
    assert process.returncode == 130


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["config", "check", "{config}"], ["privacy"]])
def test_light_verbs_import_nothing_heavy(words: list[str], config: str) -> None:
    words = [word.format(config=config) for word in words]
    done = python(
        f"import sys\nfrom fedlm.cli import main\nmain({words!r})\n"
        "heavy = {'torch', 'flwr', 'ray', 'numpy', 'transformers', 'dp_accounting'} & set(sys.modules)\n"
        "raise SystemExit(', '.join(heavy) or 0)"
    )
    assert done.returncode == 0, done.stderr


def test_quiet_variables_are_set_unless_the_user_has() -> None:
    code = (
        "import json, os\nfrom fedlm.cli import main\nfrom fedlm.environment import QUIET_ENVIRONMENT\n"
        "main(['--version'])\n"
        "print(json.dumps({name: os.environ[name] for name in QUIET_ENVIRONMENT}))"
    )
    clean = {name: value for name, value in os.environ.items() if name not in QUIET_ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**clean, "HF_HUB_OFFLINE": "0"},
        timeout=60,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {**QUIET_ENVIRONMENT, "HF_HUB_OFFLINE": "0"}


def test_version_and_help_are_on_standard_output() -> None:
    assert fedlm("--version").stdout.startswith("fedlm ")
    plain, asked = fedlm(), fedlm("--help")
    assert (plain.returncode, plain.stdout) == (0, asked.stdout)
    for verb in (
        "simulate",
        "resume",
        "report",
        "compare",
        "pretrain",
        "plan",
        "privacy",
        "config",
        "strategies",
        "doctor",
    ):
        assert f"\n  {verb}" in asked.stdout


def test_a_summary_tells_who_was_lost_and_what_the_fleet_s_clock_says(capsys: pytest.CaptureFixture[str]) -> None:
    summary = RunSummary(
        "runs/x",
        3,
        70,
        9.0,
        8.0,
        2.0,
        None,
        None,
        None,
        "",
        "",
        "none",
        (),
        4.0,
        1e-5,
        "a sequence of a device",
        (),
        10,
        10,
        None,
        1.0,
        1.0,
        100,
        {"dropout": 20, "memory": 10},
        0.5,
    )
    _print_summary(summary, json=False)
    told = capsys.readouterr().out
    assert "30 of 100 sampled: dropout 20, memory 10" in told
    assert "0.5 virtual hours" in told
    assert "epsilon 4 at delta 1e-5 for each sequence" in told
    _print_summary(replace(summary, lost_by_cause={}, virtual_hours=None), json=False)
    plain = capsys.readouterr().out
    assert "lost" not in plain
    assert "virtual" not in plain


def test_a_summary_sets_the_realised_epsilon_beside_the_planned_one(capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"devices_trained": 70, "bytes_up_per_device": 10, "bytes_down_per_device": 10, "devices_sampled": 100}
    unknown = dict.fromkeys(("perplexity_initial", "perplexity", "bits_per_byte", "peak_device_mb", "virtual_hours"))
    summary = RunSummary(
        run_dir="runs/x",
        rounds=3,
        epsilon=2.0,
        epsilon_realised=1.50001,
        delta=1e-6,
        mechanism="blt",
        sampler="separated",
        privacy_statement="claim",
        stamps=(),
        example_epsilon=None,
        example_delta=None,
        example_statement="",
        example_stamps=(),
        devices_per_second=1.0,
        seconds=1.0,
        lost_by_cause={},
        **counts,  # type: ignore[arg-type]
        **unknown,  # type: ignore[arg-type]
    )
    _print_summary(summary, json=False)
    told = capsys.readouterr().out
    assert "epsilon 2 planned, 1.51 realised, at delta 1e-6" in told  # bounds are rounded up
    assert "buffered linear Toeplitz" in told
    assert "a device rests" in told
    assert "on the device" not in told
    _print_summary(replace(summary, sampler="poisson", epsilon_realised=2.0), json=False)
    assert "realised" not in capsys.readouterr().out


def test_config_check_and_show_tell_the_resolved_config(config: str) -> None:
    digest = config_hash(load_config(Path(config), ["rounds=7"]))
    assert fedlm("config", "check", config, "--set", "rounds=7").stdout == f"ok {digest}\n"
    checked = json.loads(fedlm("config", "check", config, "--set", "rounds=7", "--json").stdout)
    assert checked == {"ok": True, "hash": digest}
    shown = json.loads(fedlm("config", "show", config, "--set", "rounds=7", "--json").stdout)
    assert shown["hash"] == digest
    assert {row["key"]: row["value"] for row in shown["keys"]}["trainable.lora.rank"] == 4
    table = fedlm("config", "show", config).stdout
    assert all(f"\n {path}" in table or f"\n{path}" in table for path in keys())


def test_accounting_gives_published_figures() -> None:
    fleet = ["--population", "1000000", "--cohort", "1000", "--delta", "1e-6", "--allow-large-delta"]
    done = fedlm("privacy", "epsilon", *fleet, "--noise-multiplier", "1", "--rounds", "1500", "--json")
    spent = json.loads(done.stdout)
    assert spent["epsilon"] == pytest.approx(0.221, abs=1e-3)
    assert "1500 rounds, about 1000 of 1000000 users" in spent["privacy_statement"]
    assert "weak guarantee" in spent["stamps"][0]
    everybody = ["--population", "1000", "--cohort", "1000", "--delta", "1e-6"]
    done = fedlm("privacy", "calibrate", *everybody, "--epsilon", "2.92", "--rounds", "10")
    name, value = done.stdout.splitlines()[0].split()
    assert name == "noise_multiplier"
    assert float(value) == pytest.approx(5.0, abs=0.02)


def test_strategies_and_doctor_answer_in_one_object() -> None:
    names = [row["name"] for row in json.loads(fedlm("strategies", "--json").stdout)["strategies"]]
    assert {"fedavg", "fedadam"} <= set(names)
    done = fedlm("doctor", "--json", FLWR_TELEMETRY_ENABLED="1")
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert (done.returncode, report["ok"]) == (1, False)
    assert not checks["FLWR_TELEMETRY_ENABLED"]["ok"]
    assert checks["FLWR_DISABLE_UPDATE_CHECK"]["ok"]
    assert checks["python"] == {
        "name": "python",
        "ok": True,
        **{k: checks["python"][k] for k in ("found", "fix")},
    }
