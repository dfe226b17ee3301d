"""From a run's records to its charts: which figures, on which axes, under which words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedlm.rounding import stamped
from simulations.report.axes import Axis, suits_log
from simulations.report.bars import Bar, bar_chart
from simulations.report.figures import bound, change, count, data_size, figure, share, size_unit
from simulations.report.lines import Point, Reference, Series, line_chart
from simulations.report.markup import Markup, element, text
from simulations.run_files import Record, RunRecord, number
from simulations.summary import lost_by_cause

ROUNDS = Axis("round", whole=True, from_zero=True, rounded=False)
_SMALL = 190.0
KINDS = {
    "lora_a": "LoRA, factors A",
    "lora_b": "LoRA, factors B",
    "bias": "biases",
    "dense": "dense tensors",
    "rows": "embedding rows",
}


def card(title: str, note: str, chart: Markup) -> Markup:
    """Return a chart with its heading and one sentence on how to read it."""
    return element("figure", element("figcaption", text("h3", title), text("p", note)), chart, class_="card")


def learning_panels(record: RunRecord) -> list[Markup]:
    """Return perplexity and bits per byte, each against rounds and against a device's traffic."""
    unit, traffic = _traffic(record)
    megabytes = Axis(f"{unit} up and down", from_zero=True, rounded=False)
    panels = []
    for name, key, height in (
        ("Perplexity", "perplexity", 290.0),
        ("Bits per byte", "bits_per_byte", _SMALL),
    ):
        points = points_of(record.metrics, key)
        by_traffic = tuple((traffic[int(place)], value) for place, value in points)
        panels += [
            _learning(f"{name} by round", points, ROUNDS, height, "Held-out users, exact softmax; lower is better."),
            _learning(
                f"{name} by traffic",
                by_traffic,
                megabytes,
                height,
                "Against all that a device sends and receives if it is in every round.",
            ),
        ]
    figures = [{"round": line["round"], **(line.get("evaluation") or {})} for line in record.metrics]
    for key in dict.fromkeys(key for line in figures for key in line if key != "round"):
        title = f"{key.replace('_', ' ').capitalize()} by round"
        panels.append(_learning(title, points_of(figures, key), ROUNDS, _SMALL, "Held-out users."))
    return panels


def epsilon_panel(record: RunRecord) -> Markup:
    """Return the privacy spent against rounds, with the target where the config has one."""
    points = points_of(record.metrics, "epsilon")
    delta = figure(number(record.privacy, "delta"))
    if number(record.metrics[-1], "epsilon") is None:
        return _absent("Epsilon by round", "No finite epsilon: this run gives no differential privacy guarantee.")
    target = number(record.config().get("privacy", {}), "epsilon")
    return card(
        "Epsilon by round",
        stamped(f"Privacy loss spent so far, at delta {delta}.", record.stamps),
        line_chart(
            [Series("epsilon", points, end=bound(points[-1][1]))],
            title="Epsilon by round",
            description=f"Epsilon reaches {bound(points[-1][1])} at round {points[-1][0]:.0f}.",
            x=ROUNDS,
            y=Axis("epsilon", from_zero=True),
            reference=Reference(target, f"target {figure(target)}") if target else None,
            height=250.0,
        ),
    )


def diagnostic_panels(record: RunRecord) -> list[Markup]:
    """Return the norms of what was released and, where devices told it, their own norms and the clipped share."""
    return [_norms(record), *_clipping(record)]


def fleet_panels(record: RunRecord) -> list[Markup]:
    """Return what an update consists of, what became of the devices and, with a virtual clock, how long they took."""
    return [_payload(record), _outcomes(record), *_device_seconds(record)]


def _learning(title: str, points: tuple[Point, ...], x: Axis, height: float, note: str) -> Markup:
    if not points:
        return _absent(title, "No evaluation in this run yet.")
    name = title.partition(" by ")[0].lower()
    (_, first), (_, last) = points[0], points[-1]
    values = [value for _, value in points]
    story = f"{name} goes from {figure(first)} to {figure(last)}, {change(first, last)}." if first else ""
    series = Series(name, points, end=figure(last), start=figure(first) if len(points) > 1 else "")
    y = Axis(name, log=suits_log(values))
    return card(title, note, line_chart([series], title=title, description=story, x=x, y=y, height=height))


def _norms(record: RunRecord) -> Markup:
    own = [
        Series("devices, p90", points_of(record.raw, "client_norm_p90"), tone="c"),
        Series("devices, median", points_of(record.raw, "client_norm_median"), tone="b"),
    ]
    compared = " and the devices' own updates before clipping" if any(one.points for one in own) else ""
    series = [Series("released", points_of(record.metrics, "update_norm")), *own]
    values = [value for one in series for _, value in one.points]
    if not values:
        return _absent("Update norms by round", "No round has been trained yet.")
    clip_norm, clip_norms = number(record.start, "clip_norm"), points_of(record.trained_rounds, "clip_norm")
    if len({value for _, value in clip_norms}) > 1:
        # It follows the norms: a line of its own, in place of the level it started from.
        clip_norm = None
        series.append(Series("clip norm", clip_norms, tone="d"))
        values += [value for _, value in clip_norms]
    return card(
        "Update norms by round",
        f"L2 norms of the released mean with its noise{compared}.",
        line_chart(
            series,
            title="Update norms by round",
            description="; ".join(f"{one.label} ends at {figure(one.points[-1][1])}" for one in series if one.points),
            x=ROUNDS,
            y=Axis("L2 norm", log=suits_log([*values, *([clip_norm] if clip_norm else [])]), from_zero=True),
            reference=Reference(clip_norm, f"clip norm {figure(clip_norm)}") if clip_norm else None,
        ),
    )


def _clipping(record: RunRecord) -> list[Markup]:
    points = tuple((place, 100 * share) for place, share in points_of(record.raw, "clip_fraction"))
    if points:
        return [_clipped(points)]
    if points_of(record.dp_metrics, "clip_fraction"):
        return []  # among the releases
    return [_absent("Clipped devices by round", "This run did not measure it.")]


def _clipped(points: tuple[Point, ...]) -> Markup:
    return card(
        "Clipped devices by round",
        "Share of devices whose update was longer than the clip norm.",
        line_chart(
            [Series("% clipped", points, end=f"{points[-1][1]:.0f} %")],
            title="Clipped devices by round",
            description=f"{points[-1][1]:.0f} per cent of the devices are clipped in the last round.",
            x=ROUNDS,
            y=Axis("% of devices", from_zero=True),
        ),
    )


def _payload(record: RunRecord) -> Markup:
    sizes: Counter[str] = Counter()
    blocks: Counter[str] = Counter()
    for block in record.start.get("blocks") or ():
        sizes[str(block["kind"])] += int(block["bytes"])
        blocks[str(block["kind"])] += 1
    if not sizes:
        return _absent("Bytes of an update", "The ledger lists no blocks.")
    total = sizes.total()
    bars = [
        Bar(
            label=f"{KINDS.get(kind, kind)} ({count(blocks[kind], 'block')})",
            value=size,
            shown=f"{data_size(size)} · {share(size, total)}",
            hover=f"{size:,} bytes",
        )
        for kind, size in sizes.most_common()
    ]
    return card(
        "Bytes of an update",
        f"What one device sends in one round, by kind of block: {data_size(total)}.",
        bar_chart(bars, title="Bytes of an update", description="; ".join(f"{b.label}: {b.shown}" for b in bars)),
    )


def _outcomes(record: RunRecord) -> Markup:
    rounds = record.events("round")
    failed = lost_by_cause(record)
    trained = sum(int(event.get("trained", 0)) for event in rounds)
    total = trained + sum(failed.values())
    outcomes = [
        ("trained", trained, False),
        *((f"failed: {why}", num, True) for why, num in failed.items()),
    ]
    bars = [
        Bar(label, num, f"{num:,} · {share(num, total)}", f"{num:,} of {total:,}", hatched)
        for label, num, hatched in outcomes
    ]
    lost = len(record.events("worker_lost"))
    workers = f" {count(lost, 'worker')} lost." if lost else ""
    return card(
        "Devices by outcome",
        f"Every device sampled, over {count(len(rounds), 'round')}.{workers}",
        bar_chart(bars, title="Devices by outcome", description="; ".join(f"{b.label}: {b.shown}" for b in bars)),
    )


def _device_seconds(record: RunRecord) -> list[Markup]:
    lines = [{"round": event["round"], **event["virtual"]} for event in record.events("round") if event.get("virtual")]
    if not lines:
        return []
    series = [
        Series("slowest", points_of(lines, "device_s_max")),
        Series("p90", points_of(lines, "device_s_p90"), tone="c"),
        Series("median", points_of(lines, "device_s_median"), tone="b"),
    ]
    values = [value for one in series for _, value in one.points]
    if not values:
        return [_absent("Virtual seconds of a device", "No device has taken part yet.")]
    return [
        card(
            "Virtual seconds of a device",
            "Download, training and upload on the devices of the profile, cut at the deadline; those that stayed away "
            "are left out.",
            line_chart(
                series,
                title="Virtual seconds of a device",
                description="; ".join(
                    f"{one.label} ends at {figure(one.points[-1][1])} s" for one in series if one.points
                ),
                x=ROUNDS,
                y=Axis("seconds", log=suits_log([value for value in values if value > 0]), from_zero=True),
                height=_SMALL,
            ),
        )
    ]


def points_of(lines: Sequence[Record], key: str) -> tuple[Point, ...]:
    """Return (round, figure) of the lines that have the figure."""
    return tuple((float(line["round"]), value) for line in lines if (value := number(line, key)) is not None)


def _traffic(record: RunRecord) -> tuple[str, dict[int, float]]:
    """Return a unit and, by round, the cumulative traffic in it of a device sampled in every round."""
    of_round = {
        event.get("round"): sum(
            (number(event, total) or 0) / max(number(event, devices) or 0, 1)
            for total, devices in (("bytes_up", "uploaded"), ("bytes_down", "downloaded"))
        )
        for event in record.events("round")
    }
    so_far, totals = 0.0, {}
    for line in record.metrics:
        so_far += of_round.get(line["round"], 0.0)
        totals[line["round"]] = so_far
    divisor, unit = size_unit(so_far)
    return unit, {place: total / divisor for place, total in totals.items()}


def _absent(title: str, why: str) -> Markup:
    return element("figure", element("figcaption", text("h3", title)), text("p", why, class_="absent"), class_="card")
