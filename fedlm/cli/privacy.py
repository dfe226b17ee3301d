"""`fedlm privacy`: accounting of the Poisson-sampled Gaussian mechanism, no config needed."""

from __future__ import annotations

from typing import Annotated, Any

import click
import typer

from fedlm.cli.options import Json
from fedlm.cli.output import print_json
from fedlm.errors import ConfigError

app = typer.Typer(help="Privacy accounting.")

Population = Annotated[int, typer.Option(min=1, help="Users in the fleet.")]
Cohort = Annotated[int, typer.Option(min=1, help="Expected users a round (Poisson sampling).")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds.")]


class Positive(click.FloatRange):
    """A finite number above zero; `max` is exclusive. click's own range lets NaN pass."""

    def __init__(self, max: float = float("inf")) -> None:
        super().__init__(min=0, max=max, min_open=True, max_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if number != number:
            self.fail("nan is no number", param, ctx)
        return number


Delta = Annotated[float, typer.Option(click_type=Positive(max=1), help="Below one over the population.")]


@app.command()
def epsilon(
    population: Population,
    cohort: Cohort,
    noise_multiplier: Annotated[
        float, typer.Option(click_type=Positive(), help="Noise standard deviation over the clip norm.")
    ],
    rounds: Rounds,
    delta: Delta,
    json: Json = False,
) -> None:
    """Print the epsilon that a training spends."""
    probability = _sampling_probability(population, cohort)
    from fedlm.privacy.accounting import epsilon

    spent = epsilon(sampling_probability=probability, noise_multiplier=noise_multiplier, rounds=rounds, delta=delta)
    _print(json, "epsilon", spent, _statement(spent, delta, noise_multiplier, population, cohort, rounds))


@app.command()
def calibrate(
    epsilon: Annotated[float, typer.Option(click_type=Positive(), help="The epsilon to spend.")],
    population: Population,
    cohort: Cohort,
    rounds: Rounds,
    delta: Delta,
    json: Json = False,
) -> None:
    """Print the least noise multiplier that keeps a training within epsilon."""
    probability = _sampling_probability(population, cohort)
    from fedlm.privacy.accounting import noise_multiplier

    noise = noise_multiplier(sampling_probability=probability, rounds=rounds, epsilon=epsilon, delta=delta)
    _print(json, "noise_multiplier", noise, _statement(epsilon, delta, noise, population, cohort, rounds))


def _sampling_probability(population: int, cohort: int) -> float:
    if cohort > population:
        raise ConfigError(f"--cohort {cohort} is more than --population {population}; expect fewer users a round")
    return cohort / population


def _statement(epsilon: float, delta: float, noise_multiplier: float, population: int, cohort: int, rounds: int) -> str:
    return (
        f"({epsilon:.4g}, {delta:g})-differentially private for each user (add or remove one): "
        f"Gaussian noise of multiplier {noise_multiplier:.4g} in each of {rounds} rounds, "
        f"about {cohort} of {population} users Poisson-sampled in each; PLD accounting"
    )


def _print(json: bool, name: str, value: float, statement: str) -> None:
    if json:
        print_json({name: value, "statement": statement})
    else:
        print(f"{name} {value:.4f}\n{statement}")
