"""The verbs of `fedlm`, assembled."""

from __future__ import annotations

from typing import Annotated

import typer

from fedlm.cli import audit, configs, finetune, machine, plan, privacy, runs

# Plain help: rich's panels would double the time of `fedlm --help`.
app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(runs.simulate)
app.command()(runs.resume)
app.command()(runs.report)
app.command()(runs.compare)
app.command()(runs.pretrain)
app.command()(finetune.finetune)
app.command()(plan.plan)
app.command()(audit.audit)
app.add_typer(privacy.app, name="privacy")
app.add_typer(configs.app, name="config")
app.command()(machine.strategies)
app.command()(machine.doctor)


def _print_version(show: bool) -> None:
    if show:
        from fedlm.cli.distribution import version

        print(f"fedlm {version()}")
        raise typer.Exit


@app.callback()
def _fedlm(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Private federated learning of large-vocabulary language models."""
