"""`fedlm finetune`: example-level DP fine-tuning on this machine."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlm.cli.options import ConfigFile, Json, Overrides, Quiet, read_config
from fedlm.cli.output import print_json, print_pairs
from fedlm.cli.progress import progress

if TYPE_CHECKING:
    from fedlm.config import Config
    from fedlm.finetuning.run import FinetuneSummary

OutFolder = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="The run folder; left out: a new one under runs/.")
]


def finetune(
    config: ConfigFile = None,
    overrides: Overrides = None,
    out: OutFolder = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a language model or a classifier with example-level DP, on this machine.

    CONFIG is a TOML file whose section [finetune] names the examples; their files are looked for in the working folder,
    then beside CONFIG.
    """
    settings = _with_files(read_config(config, overrides), config)
    from fedlm.finetuning.run import finetune

    with progress(quiet=quiet, json=json) as listener:
        summary = finetune(settings, out, listener)
    if json:
        print_json(asdict(summary))
    else:
        _print(summary)


def _with_files(config: Config, path: Path | None) -> Config:
    """Return the config with the example files that lie beside it instead of in the working folder."""
    finetune = config.finetune

    def found(name: str) -> str:
        there = path.parent / name if path is not None else Path(name)
        return str(there) if name and not Path(name).expanduser().exists() and there.exists() else name

    return replace(config, finetune=replace(finetune, train=found(finetune.train), test=found(finetune.test)))


def _print(summary: FinetuneSummary) -> None:
    from simulations.report.figures import data_size, figure

    scores = [
        ("accuracy", summary.accuracy_initial, summary.accuracy),
        ("perplexity", summary.perplexity_initial, summary.perplexity),
    ]
    print_pairs(
        [
            *(
                (name, f"{figure(before, 4)} → {figure(after, 4)}")
                for name, before, after in scores
                if after is not None
            ),
            *([("BLEU", figure(summary.bleu, 3))] if summary.bleu is not None else []),
            ("privacy", summary.privacy_statement),
            ("trained", f"{figure(summary.num_trained)} parameters, {data_size(summary.update_bytes)}"),
            (
                "training",
                f"{summary.steps:,} steps over {summary.num_examples:,} examples, "
                f"{figure(summary.seconds_per_step, 3)} s each",
            ),
            ("cost", f"{figure(summary.peak_mb, 3)} MB of memory at most, {figure(summary.seconds, 3)} s in all"),
            ("run", summary.run_dir),
        ]
    )
