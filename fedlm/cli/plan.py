"""`fedlm plan`: what an experiment will cost, before any training."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Annotated, Any

import typer

from fedlm.cli.options import ConfigFile, Json, Overrides, read_config
from fedlm.cli.output import print_json, print_pairs, print_table
from fedlm.cli.privacy import Positive
from fedlm.rounding import rounded_up, stamped

_SHOWN_SETTINGS = 24


def plan(
    config: ConfigFile = None,
    overrides: Overrides = None,
    ram: Annotated[
        float | None, typer.Option(click_type=Positive(), help="Memory for training on a device, MB.")
    ] = None,
    bandwidth: Annotated[float, typer.Option(click_type=Positive(), help="Network, each way, Mbit/s.")] = 20.0,
    gflops: Annotated[float, typer.Option(click_type=Positive(), help="Speed of a device, GFLOP/s.")] = 10.0,
    deadline: Annotated[float | None, typer.Option(click_type=Positive(), help="Seconds a round may take.")] = None,
    epsilon: Annotated[
        float | None, typer.Option(click_type=Positive(), help="Calibrate the noise to this epsilon.")
    ] = None,
    max_noise: Annotated[
        float, typer.Option(click_type=Positive(), help="Largest noise-to-signal of a round that still fits.")
    ] = 1.0,
    json: Json = False,
) -> None:
    """Print payload, memory, noise and time before any training, and which settings fit a device.

    CONFIG is a TOML file; left out: the embedded default job.
    """
    words = list(overrides or ())
    if epsilon is not None:
        words += ["privacy.enabled=true", f"privacy.epsilon={epsilon}", "privacy.noise_multiplier=0"]
    settings = read_config(config, words)
    from fedlm import api
    from fedlm.planning.forecast import Device
    from fedlm.privacy.guarantee import to_dict

    device = Device(ram or math.inf, bandwidth, gflops, deadline or math.inf)
    forecast = api.plan(settings, device, max_noise=max_noise)
    found = asdict(forecast) | to_dict(forecast.guarantee)
    del found["guarantee"]  # its fields stand beside the others, as in every verb
    if json:
        print_json(found)
    else:
        _show(found)


def _spent(found: dict[str, Any]) -> str:
    """Return epsilon and delta with the verdicts of their stamps."""
    from simulations.report.figures import figure

    if found["epsilon"] is None:
        return stamped("no finite epsilon", found["stamps"])
    return stamped(f"epsilon {rounded_up(found['epsilon'])} at delta {figure(found['delta'], 2)}", found["stamps"])


def _show(found: dict[str, Any]) -> None:
    from simulations.report.figures import data_size, figure

    moved, time, device = found["payload"], found["time"], found["device"]
    noise = ", ".join(f"{kind} {figure(value, 3)}" for kind, value in found["noise_to_signal"].items())
    kinds = ", ".join(f"{kind} {data_size(size)}" for kind, size in moved["up_by_kind"].items())
    print_pairs(
        [
            ("update", f"{found['coordinates']:,} coordinates: {kinds}"),
            ("up", f"{data_size(moved['up'])} a device and round"),
            (
                "down",
                f"{data_size(moved['down_again'])} after {figure(moved['rounds_between'], 3)} rounds, a device's mean "
                f"pause; {data_size(moved['down_first'])} at a first visit in the last round; the base comes once",
            ),
            ("privacy", _spent(found)),
            *(("", stamp) for stamp in found["stamps"]),
            (
                "noise",
                f"multiplier {figure(found['noise_multiplier'])}, clip norm {figure(found['clip_norm'])}, "
                f"expected cohort {found['expected_cohort']:,}",
            ),
            ("noise-to-signal", f"{noise} (noise's norm over the largest possible signal)"),
            (
                "time",
                f"{figure(time['round_s'], 3)} s a round on the median device: {figure(time['compute_s'], 3)} s at "
                f"{figure(device['gflops'])} GFLOP/s, {figure(time['transfer_s'], 3)} s at "
                f"{figure(device['bandwidth_mbit'])} Mbit/s",
            ),
            (
                "run",
                f"{time['rounds']:,} rounds, {figure(time['device_rounds'])} device-rounds, "
                f"{figure(time['device_hours'], 3)} device-hours",
            ),
        ]
    )
    _show_memory(found)
    _show_settings(found["settings"])
    for note in found["notes"]:
        print(f"\nnote: {note}")


def _show_memory(found: dict[str, Any]) -> None:
    from simulations.report.figures import figure

    memory = found["memory_mb"]
    first = next(iter(memory.values()))
    header = ("memory, MB", *(f"{name} ({figure(parts['tokens'])} tokens)" for name, parts in memory.items()))
    names = [name for name in first if name not in ("tokens", "total")] + ["total"]
    print()
    print_table(header, [(name, *(f"{parts[name]:.1f}" for parts in memory.values())) for name in names])
    if math.isfinite(found["device"]["ram_mb"]):
        share, ram_mb = found["users_within_ram"], found["device"]["ram_mb"]
        print(f"{100 * share:.1f} % of the users' devices stay within {figure(ram_mb)} MB")


def _show_settings(rows: list[dict[str, Any]]) -> None:
    from simulations.report.figures import data_size, figure

    shown = [row for place, row in enumerate(rows) if place < _SHOWN_SETTINGS or row["asked"]]
    header = ("fits", "rank", "rows", "loss", "batch", "up", "down", "MB", "s", "noise-to-signal", "")
    print()
    print_table(
        header,
        [
            (
                "yes" if row["fits"] else f"no: {', '.join(row['misses'])}",
                str(row["rank"]),
                f"{row['rows']:,}",
                row["loss"],
                str(row["batch_size"]),
                data_size(row["bytes_up"]),
                data_size(row["bytes_down"]),
                f"{row['peak_mb']:.0f}",
                figure(row["round_s"], 3),
                figure(row["noise_to_signal"], 3),
                "asked" if row["asked"] else "",
            )
            for row in shown
        ],
    )
    if len(rows) > len(shown):
        print(f"{len(shown)} of {len(rows)} settings, the largest user's figures; --json has all")
