"""Example-level DP beside plain PyTorch, Opacus and fastDP: processor seconds and peak memory of one step.

Every row is a fresh process with one thread; rows run in turn, repetition after repetition. Before anything is timed,
each private side's clipped sum of one batch must equal the definition, one example at a time by autograd. As on a small
device, processes give blocks of 1 MiB and more back to the system at once (glibc's MALLOC_MMAP_THRESHOLD_, unless it is
set): peaks are then those of live tensors, not of a heap with holes.

    python -m benchmarks.example_dp_speed --fastdp CHECKOUT
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.example_dp_environment import fastdp_python
from benchmarks.example_dp_models import CLIP_NORM, MODELS
from benchmarks.example_dp_targets import verdicts
from benchmarks.measure import machine

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 2e-4  # float32, another order of summation
NOTES = f"""\
Alike: stock modules of transformers, weights, batch, float32, clip norm {CLIP_NORM}; a step is forward, backward and
clipping, without noise and optimiser. MiB: peak of a step above the process with the model in it. Time: processor time.
What differs: Opacus and fastDP run as installed, except that fastDP's swapped forward methods (of transformers 4) are
left out and that it starts from zeros, which spares it its noise. fedlm's language model goes through its seam: linear
modules for GPT-2's transposed ones, plain attention up to 64 tokens, scores in chunks of the vocabulary; every other
side has whole (B, T, V) logits, but for "plain bias, our head": autograd through the same seam and head. fedlm clips to
1/1.001 of the norm, against rounding; here it is given 1.001 of the norm, so that all sums are comparable."""


@dataclass(frozen=True)
class Row:
    """One way to train a model.

    Arguments:
        side: A name that `example_dp_row` knows.
        scope: "full", "body", "bias" or "lora".
    """

    side: str
    scope: str


PLAIN_ROWS = ("plain full", "plain bias")
_COMMON = {
    "plain full": Row("plain", "full"),
    "plain bias": Row("plain", "bias"),
    "fedlm full": Row("ours", "full"),
    "fedlm BiTFiT": Row("ours", "bias"),
    "fedlm LoRA": Row("ours", "lora"),
    "Opacus full, hooks": Row("opacus hooks", "full"),
    "Opacus full, ghost": Row("opacus ghost", "full"),
    "Opacus bias, hooks": Row("opacus hooks", "bias"),
    "fastDP full": Row("fastdp", "full"),
    "fastDP bias": Row("fastdp", "bias"),
}
_LM_ONLY = {"plain bias, our head": Row("plain, our head", "bias"), "fedlm, table frozen": Row("ours", "body")}
ROWS: Mapping[str, Mapping[str, Row]] = {"classifier": _COMMON, "lm": {**_COMMON, **_LM_ONLY}}


def main() -> None:
    """Check, then measure every row in interleaved repetitions and print medians, ratios and verdicts."""
    arguments = _parser().parse_args()
    python = {"fastdp": fastdp_python(arguments.fastdp)} if arguments.fastdp else {}
    if not python:
        print("without --fastdp CHECKOUT its rows are left out", file=sys.stderr)
    result: dict[str, Any] = {"machine": machine(), "models": {}}
    for kind in arguments.models:
        run = Runner(kind, python, arguments.steps)
        rows = {label: row for label, row in ROWS[kind].items() if row.side != "fastdp" or python}
        checks = check(run, rows, min(arguments.lengths))
        sound = [label for label in rows if "refused" not in checks.get(label, {})]
        result["models"][kind] = {"checks": checks, "lengths": measure(run, rows, sound, arguments)}
        if not arguments.json:
            print(report(kind, result["models"][kind]), flush=True)
    result["verdicts"] = [v for kind, found in result["models"].items() for v in verdicts(kind, found, TOLERANCE)]
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print("\n".join([*(verdict["text"] for verdict in result["verdicts"]), "", NOTES, result["machine"]]))


def check(run: Runner, rows: Mapping[str, Row], length: int) -> dict[str, dict[str, Any]]:
    """Return for each private row: how far it is from the definition, and the norm that one example gets (at most 1).

    Raises:
        SystemExit: fedlm computes something else than the definition.
    """
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        truth, file = Path(folder) / "truth.npz", Path(folder) / "row.npz"
        private = {label: row for label, row in rows.items() if not row.side.startswith("plain")}
        for scope in dict.fromkeys(row.scope for row in private.values()):
            run(Row("one at a time", scope), length, "--check", str(truth))
            for label, row in private.items():
                if row.scope == scope:
                    print(f"{run.kind}, check: {label}", file=sys.stderr)
                    found[label] = run(row, length, "--check", str(file))
                    if "refused" not in found[label]:
                        found[label]["difference"] = difference(file, truth)
    for label, row in private.items():
        if row.side == "ours" and not found[label].get("difference", 1.0) <= TOLERANCE:
            raise SystemExit(f"{run.kind}, {label}: {found[label]}; not the clipped sum by definition")
    return found


def difference(file: Path, truth: Path) -> float:
    """Return |a - b| / |b| over all parameters together; infinite if they are not the same ones."""
    with np.load(file) as a, np.load(truth) as b:
        if set(a.files) != set(b.files) or any(a[name].shape != b[name].shape for name in a.files):
            return float("inf")
        squares = [(float(np.square(a[name] - b[name]).sum()), float(np.square(b[name]).sum())) for name in a.files]
    return float((sum(d for d, _ in squares) / sum(n for _, n in squares)) ** 0.5)


def measure(run: Runner, rows: Mapping[str, Row], labels: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return each row's medians, by length and label."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for repeat in range(arguments.repeats):
        for length in arguments.lengths:
            for label in labels:
                print(f"{run.kind}, repetition {repeat + 1}, T {length}: {label}", file=sys.stderr)
                found.setdefault(str(length), {}).setdefault(label, []).append(run(rows[label], length))
    return {
        length: {label: {field: median(r[field] for r in runs) for field in runs[0]} for label, runs in cells.items()}
        for length, cells in found.items()
    }


class Runner:
    """Runs a row of one model in a process of its side's interpreter.

    Arguments:
        kind: The model.
        python: Interpreters of sides that have their own.
        steps: Timed steps of a process.
    """

    def __init__(self, kind: str, python: Mapping[str, Path], steps: int) -> None:
        self.kind, self._python, self._steps = kind, python, steps

    def __call__(self, row: Row, length: int, *options: str) -> dict[str, Any]:
        """Return what the process printed."""
        command = [str(self._python.get(row.side, sys.executable)), "-W", "ignore", "-m", "benchmarks.example_dp_row",
                   "--side", row.side, "--model", self.kind, "--scope", row.scope, "--length", str(length),
                   "--steps", str(self._steps)]  # fmt: skip
        environment = {"MALLOC_MMAP_THRESHOLD_": str(2**20), **os.environ, "OMP_NUM_THREADS": "1"}
        environment["MKL_NUM_THREADS"] = "1"
        done = subprocess.run(
            [*command, *options], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def report(kind: str, found: Mapping[str, Any]) -> str:
    """Return one model's checks and figures as text."""
    sizes = MODELS[kind]
    lines = [
        f"{kind}: V {sizes.vocabulary:,}, d {sizes.width}, {sizes.num_layers} layers, B {sizes.num_examples}",
        f"{'':22}{'from the definition':>21}{'one example, in C':>19}",
    ]
    for label, checked in found["checks"].items():
        lines.append(f"{label:22}" + _checked(checked))
    for length, rows in found["lengths"].items():
        columns = [f"T {length:20}", "s a step".rjust(9), _RATIOS, "MiB".rjust(9), _RATIOS]
        lines += ["", "".join(columns)]
        lines += [_line(label, rows, found["checks"].get(label)) for label in rows]
    return "\n".join([*lines, ""])


_RATIOS = f"{'x full':>8}{'x bias':>8}"  # of the plain rows


def _line(label: str, rows: Mapping[str, Mapping[str, float]], checked: Mapping[str, Any] | None) -> str:
    line = f"{label:22}"
    for field, form in (("step_s", "9.3f"), ("peak_mib", "9.1f")):
        value = rows[label][field]
        line += f"{value:{form}}" + "".join(f"{value / rows[other][field]:8.2f}" for other in PLAIN_ROWS)
    return line + ("" if is_sound(checked) else "  WRONG")


def is_sound(checked: Mapping[str, Any] | None) -> bool:
    """Return whether a row computes what the definition says; plain rows are not checked."""
    return checked is None or checked.get("difference", 1.0) <= TOLERANCE


def _checked(checked: Mapping[str, Any]) -> str:
    if "refused" in checked:
        return f"  refuses: {checked['refused']}"
    wrong = "" if is_sound(checked) else "  WRONG"
    return f"{checked['difference']:21.1e}{checked['single_norm']:19.3f}{wrong}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fastdp", type=Path, help="a checkout of awslabs/fast-differential-privacy")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 256, 512], help="T, tokens of an example")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes for each row")
    parser.add_argument("--steps", type=int, default=9, help="timed steps in each process, at most")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    main()
