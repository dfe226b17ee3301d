"""`fedlm privacy`: accounting of every mechanism and sampler, and a table to choose from; no config needed."""

from __future__ import annotations

from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from fedlm.cli.options import Json
from fedlm.cli.output import print_json, print_table
from fedlm.errors import ConfigError, OutputError
from fedlm.registry import COHORT_SAMPLERS, MECHANISMS
from fedlm.rounding import rounded_up, stamped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fedlm.privacy.guarantee import Guarantee
    from fedlm.privacy.mechanisms import Mechanism, Participation
    from fedlm.privacy.mechanisms.compare import Row

app = typer.Typer(help="Privacy accounting.")

Population = Annotated[int, typer.Option(min=1, help="Users in the fleet.")]
Cohort = Annotated[int, typer.Option(min=1, help="Expected users a round.")]
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
AllowLargeDelta = Annotated[
    bool, typer.Option("--allow-large-delta", help="Accept a delta of 1 / population or more, and warn of it.")
]
MechanismName = Annotated[str, typer.Option("--mechanism", help=f"{MECHANISMS.allowed}.")]
Sampler = Annotated[
    str,
    typer.Option(help=f"{COHORT_SAMPLERS.allowed}; empty: the mechanism's own."),
]
Cap = Annotated[int, typer.Option(min=0, help="truncated_poisson: the largest cohort.")]
MinSeparation = Annotated[
    int, typer.Option(min=0, help="separated: rounds between two of a user's; 0: population / cohort.")
]
MaxParticipations = Annotated[int, typer.Option(min=0, help="Most rounds of one user; 0: as the separation has it.")]
Size = Annotated[int, typer.Option(min=1, help="Coordinates of an update, for mechanisms that are made for a number.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="An option of the mechanism (bands=8); repeatable."),
]


@app.command()
def epsilon(
    population: Population,
    cohort: Cohort,
    noise_multiplier: Annotated[
        float, typer.Option(click_type=Positive(), help="Noise standard deviation over the clip norm.")
    ],
    rounds: Rounds,
    delta: Delta,
    mechanism: MechanismName = "gaussian",
    sampler: Sampler = "",
    cap: Cap = 0,
    min_separation: MinSeparation = 0,
    max_participations: MaxParticipations = 0,
    option: Options = None,
    size: Size = 1_000_000,
    allow_large_delta: AllowLargeDelta = False,
    json: Json = False,
) -> None:
    """Print the epsilon that a training spends."""
    _require_cohort(population, cohort)
    _require_delta(delta, population, allow_large_delta)
    fleet = {"population": population, "cohort": cohort, "rounds": rounds}
    rule = _rule(fleet, mechanism, sampler, cap, min_separation, max_participations)
    made = _create(mechanism, rule, delta, noise_multiplier=noise_multiplier, epsilon=0.0, size=size, options=option)
    spent = made.epsilon(noise_multiplier=noise_multiplier, num_releases=rounds, delta=delta)
    guarantee = _guarantee(made, spent, delta, noise_multiplier)
    _print(json, "epsilon", spent, guarantee, made, noise_multiplier)


@app.command()
def calibrate(
    epsilon: Annotated[float, typer.Option(click_type=Positive(), help="The epsilon to spend.")],
    population: Population,
    cohort: Cohort,
    rounds: Rounds,
    delta: Delta,
    mechanism: MechanismName = "gaussian",
    sampler: Sampler = "",
    cap: Cap = 0,
    min_separation: MinSeparation = 0,
    max_participations: MaxParticipations = 0,
    option: Options = None,
    size: Size = 1_000_000,
    allow_large_delta: AllowLargeDelta = False,
    json: Json = False,
) -> None:
    """Print the least noise multiplier that keeps a training within epsilon."""
    _require_cohort(population, cohort)
    _require_delta(delta, population, allow_large_delta)
    fleet = {"population": population, "cohort": cohort, "rounds": rounds}
    rule = _rule(fleet, mechanism, sampler, cap, min_separation, max_participations)
    made = _create(mechanism, rule, delta, noise_multiplier=0.0, epsilon=epsilon, size=size, options=option)
    noise = made.noise_multiplier(epsilon=epsilon, delta=delta)
    _print(json, "noise_multiplier", noise, _guarantee(made, epsilon, delta, noise), made, noise)


@app.command()
def compare(
    population: Annotated[int, typer.Option(min=0, help="Users in the fleet.")] = 0,
    cohort: Annotated[int, typer.Option(min=0, help="Expected users a round.")] = 0,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds.")] = 0,
    delta: Annotated[
        float | None, typer.Option(click_type=Positive(max=1), help="Below one over the population.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Take all numbers from a run folder, and update its report.")
    ] = None,
    epsilon: Annotated[
        list[float] | None, typer.Option(click_type=Positive(), help="Repeatable; left out: 1, 2, 4 and 8.")
    ] = None,
    min_separation: MinSeparation = 0,
    max_vectors: Annotated[
        int, typer.Option(min=0, help="Most vectors of earlier noise for banded noise; 0: no limit.")
    ] = 16,
    allow_large_delta: AllowLargeDelta = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw the noise against epsilon.")] = None,
    json: Json = False,
) -> None:
    """Print the noise of every mechanism at the same epsilon, and which to choose; for a run, in its report too."""
    _require_numbers({"--population": population, "--cohort": cohort, "--rounds": rounds, "--delta": delta or 0}, run)
    own, stamps = None, _stamps(delta or 0.0, population)
    if run is not None:
        from simulations.which_mechanism import compare_run

        compared = compare_run(run, epsilons=epsilon or (), separation=min_separation, max_vectors=max_vectors)
        rows, sentences, own, stamps = compared.rows, compared.advice, compared.own, compared.stamps
    else:
        _require_cohort(population, cohort)
        _require_delta(delta or 0.0, population, allow_large_delta)
        from fedlm.privacy.mechanisms.compare import EPSILONS, advice, compare

        rows = compare(
            population=population,
            cohort=cohort,
            rounds=rounds,
            delta=delta or 0.0,
            epsilons=sorted(set(epsilon or EPSILONS)),
            separation=min_separation,
            max_vectors=max_vectors,
        )
        sentences = advice(rows)
    if plot is not None:
        _plot(rows, own, plot)
    if json:
        found = {"rows": [asdict(row) for row in rows], "advice": sentences, "stamps": stamps}
        print_json(found | ({"run": own} if own else {}))
    else:
        _print_rows(rows)
        print("", *sentences, *(f"{stamp}." for stamp in stamps), sep="\n")


def _require_numbers(numbers: dict[str, float], run: Path | None) -> None:
    """Refuse numbers beside a run, which has its own, and missing ones without."""
    given = [name for name, number in numbers.items() if number]
    missing = [name for name in numbers if name not in given]
    if run is not None and given:
        raise ConfigError(f"--run {run} has its own {', '.join(given)}; leave out one or the other")
    if run is None and missing:
        raise ConfigError(f"{', '.join(missing)} missing; give them, or --run with a run folder")


def _require_cohort(population: int, cohort: int) -> None:
    if cohort > population:
        raise ConfigError(f"--cohort {cohort} is more than --population {population}; expect fewer users a round")


def _require_delta(delta: float, population: int, allowed: bool) -> None:
    """Refuse a delta at which whole users may be published, unless somebody asks for it."""
    if delta >= 1 / population and not allowed:
        raise ConfigError(
            f"--delta {delta:g} is not below 1 / --population {population} = {1 / population:.3g}, so that whole users "
            "may be published; lower it, or give --allow-large-delta"
        )


def _stamps(delta: float, population: int) -> tuple[str, ...]:
    from fedlm.privacy.guarantee import large_delta

    return large_delta(delta, population, things="users", key="--delta") if population else ()


def _rule(
    fleet: dict[str, int], mechanism: str, sampler: str, cap: int, min_separation: int, max_participations: int
) -> Participation:
    """Return who can be in which cohort, with what was left out filled in."""
    from fedlm.privacy.sampling.cohorts import participation_rule

    return participation_rule(
        sampler or MECHANISMS.resolve(mechanism).samplers[0],
        **fleet,
        cap=cap,
        min_separation=min_separation,
        max_participations=max_participations,
    )


def _create(
    name: str, rule: Participation, delta: float, *, options: Sequence[str] | None, **numbers: Any
) -> Mechanism:
    from fedlm.config.keys import typed_options
    from fedlm.config.load import parse_options
    from fedlm.privacy.mechanisms import create

    if rule.cap and not COHORT_SAMPLERS.resolve(rule.sampler).takes_cap:
        raise ConfigError(f"--cap {rule.cap} has no meaning for --sampler {rule.sampler}; use truncated_poisson")
    parsed = parse_options(options or ())
    typed_options(MECHANISMS.resolve(name), parsed, MECHANISMS.options_key)
    return create(name, rule, delta=delta, **numbers, **parsed)


def _guarantee(mechanism: Mechanism, epsilon: float, delta: float, noise_multiplier: float) -> Guarantee:
    from fedlm.privacy.guarantee import Guarantee
    from fedlm.privacy.statement import UNIT

    rule, noise = mechanism.participation, f"{noise_multiplier:.4g}"
    if (mechanism.name, rule.sampler) == ("gaussian", "poisson"):
        hides = "add or remove one"
        how = (
            f"Gaussian noise of multiplier {noise} in each of {rule.rounds} rounds, "
            f"about {rule.cohort} of {rule.population} users Poisson-sampled in each; PLD accounting"
        )
    else:
        hides, how = (
            mechanism.adjacency,
            f"noise multiplier {noise} over {rule.rounds} rounds, {mechanism.description}",
        )
    words = f"({rounded_up(epsilon)}, {delta:g})-differentially private for each user ({hides}): {how}."
    stamps = _stamps(delta, rule.population)
    return Guarantee(UNIT, mechanism.adjacency, epsilon, delta, sentences=(words,), warnings=stamps)


def _print(json: bool, name: str, value: float, guarantee: Guarantee, mechanism: Mechanism, noise: float) -> None:
    """Print one value and what it rests on; where devices add the noise, what the server learns too.

    Arguments:
        json: Print one object.
        name, value: What was asked for.
        guarantee: Of the mechanism.
        mechanism: Says how devices encode, if they do.
        noise: Its multiplier.
    """
    from fedlm.privacy.guarantee import to_dict

    found: dict[str, object] = {}
    encoder = mechanism.encoder(noise, delta=guarantee.delta, size=0)
    if encoder is not None:
        rounds = mechanism.participation.rounds
        server = mechanism.epsilon_server(noise_multiplier=noise, num_releases=rounds, delta=guarantee.delta)
        found = {"epsilon_server": server, "bits": encoder.bits}
        against = (
            f"Epsilon {rounded_up(server)} against a server that knows the cohorts and gets sums of "
            f"{encoder.min_survivors:,} devices or more; {encoder.bits} bits a coordinate."
        )
        guarantee = replace(guarantee, sentences=(*guarantee.sentences, against))
    if json:
        print_json({**to_dict(guarantee), name: value, **found})
    else:
        # Upwards: with less noise, or for a smaller epsilon, the statement would not hold.
        print(stamped(f"{name} {ceil(value * 1e4) / 1e4:.4f}", guarantee.warnings), guarantee.statement, sep="\n")


def _print_rows(rows: Sequence[Row]) -> None:
    from simulations.report.mechanisms import cells

    print_table(*cells(rows))
    print("RMSE: noise in a coordinate of the prefix sums of all releases, clip norm 1; the measure to choose by")


def _plot(rows: Sequence[Row], own: Mapping[str, Any] | None, path: Path) -> None:
    """Write the RMSE of the mechanisms against epsilon as an SVG file."""
    from server.run_folder import write_atomically
    from simulations.report.mechanisms import noise_chart
    from simulations.report.style import STYLE

    drawing = noise_chart(rows, own).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    drawing = drawing.replace(">", f"><style><![CDATA[{STYLE}]]></style>", 1)
    try:
        write_atomically(path, drawing.encode())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; name a file in a writable folder") from error
