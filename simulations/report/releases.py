"""What left the server, round by round: signal and noise of the release, scales by kind of block, DP metrics."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import fsum, sqrt

from fedlm.codec import from_text
from fedlm.errors import DataError
from fedlm.privacy.clipping.block_scaling import BlockScaling
from fedlm.privacy.plan_parameters import PlanParameters
from fedlm.trainable.spec import UpdateSpec
from simulations.report.axes import Axis, suits_log
from simulations.report.figures import figure
from simulations.report.lines import Series, line_chart
from simulations.report.markup import Markup
from simulations.report.panels import KINDS, ROUNDS, card, points_of
from simulations.run_files import Record, RunRecord, number

_TONES = "abcdef"


def release_panels(record: RunRecord) -> list[Markup]:
    """Return signal and noise of the releases, and the scales; each only where the run's files have the figures."""
    return [*_signal(record), *_scales(record)]


def metric_panels(record: RunRecord) -> list[Markup]:
    """Return a chart for each DP metric: as it left the devices, beside the devices' own mean where it was measured."""
    names = dict.fromkeys(name for line in record.dp_metrics for name in line if name != "round")
    return [chart for name in names for chart in _metric(record, name)]


def noise_norms(record: RunRecord) -> dict[int, float]:
    """Return by round the expected norm of the noise in the released mean.

    Empty where the files do not tell: without privacy, with a row set that was chosen on the way, with the allocation
    as published, whose noise follows unwritten figures, with tree noise, and for a plan of another version.
    """
    plan_parameters: PlanParameters | None = None
    with suppress(DataError):  # a report must not fail for a plan that only a chart would have used
        plan_parameters = from_text(PlanParameters, record.plan_text, where="stored privacy plan")
    blocks = record.start.get("blocks") or []
    if not plan_parameters or not plan_parameters.enabled or not blocks:
        return {}
    adaptive_rule = plan_parameters.adaptive_rule
    if adaptive_rule.selection_rounds or adaptive_rule.allocation == "published":
        return {}
    spec = UpdateSpec.build([(block["name"], block["kind"], (int(block["bytes"]) // 4,)) for block in blocks])
    grown = plan_parameters.mechanism.round_growth()
    if grown is None:
        return {}
    rounds = [line for line in record.trained_rounds if line["round"] <= len(grown)]
    return {
        line["round"]: float(_noise_norm(line, plan_parameters, spec) * grown[line["round"] - 1]) for line in rounds
    }


def _noise_norm(line: Record, plan_parameters: PlanParameters, spec: UpdateSpec) -> float:
    """Return the norm of a round's own draw: the noise of a coordinate, times its group's scale."""
    adaptive_rule = plan_parameters.adaptive_rule
    state = adaptive_rule.first_state(spec)
    state = replace(state, clip_norm=number(line, "clip_norm") or state.clip_norm)
    if state.allocation and line.get("scales"):
        state = replace(state, allocation=replace(state.allocation, scales=tuple(line["scales"])))
    clip_spec = adaptive_rule.clip_spec(state, spec, line["round"])
    block_scaling = clip_spec.block_scaling or BlockScaling(((0, spec.size, 0),), (1.0,))
    squares = fsum((stop - start) * block_scaling.scales[group] ** 2 for start, stop, group in block_scaling.spans)
    reports = (number(line, "devices") or 0.0) * plan_parameters.expected_cohort / plan_parameters.cohort
    return float(plan_parameters.noise_std(clip_spec, reports) * sqrt(squares))


def _signal(record: RunRecord) -> list[Markup]:
    noise = noise_norms(record)
    released = points_of(record.metrics, "update_norm")
    if not noise or not released:
        return []
    place, last = released[-1]
    signal = sqrt(max(last**2 - noise[int(place)] ** 2, 0.0))
    ratio = f"signal to noise {figure(signal / noise[int(place)], 2)} in the last round"
    series = [
        Series("released", released),
        Series("noise in it", tuple((float(t), norm) for t, norm in noise.items()), "b"),
    ]
    return [
        card(
            "Signal and noise by round",
            "L2 norms of what was released and of the noise that the plan adds to it; signal is the root of the "
            f"difference of their squares: {ratio}.",
            _chart("Signal and noise by round", series, "L2 norm", ratio),
        )
    ]


def _scales(record: RunRecord) -> list[Markup]:
    kinds = list(dict.fromkeys(str(block["kind"]) for block in record.start.get("blocks") or ()))
    lines = [line for line in record.trained_rounds if isinstance(line.get("scales"), list)]
    series = []
    for group in range(max((len(line["scales"]) for line in lines), default=0)):
        kind = kinds[group] if group < len(kinds) else f"group {group + 1}"
        points = tuple((float(line["round"]), float(line["scales"][group])) for line in lines)
        series.append(Series(KINDS.get(kind, kind), points, _TONES[group % len(_TONES)]))
    if not series:
        return []
    story = "; ".join(f"{one.label} ends at {figure(one.points[-1][1])}" for one in series)
    return [
        card(
            "Scales by round",
            "What each kind of block is divided by before the clip and multiplied by after it: the larger, the more of "
            "the clip norm and of the noise it gets.",
            _chart("Scales by round", series, "scale", story),
        )
    ]


def _metric(record: RunRecord, name: str) -> list[Markup]:
    pick = partial(points_of, key=name)
    private, own = pick(record.dp_metrics), pick(record.raw)
    if not private:
        return []
    words = name.replace("_", " ")
    series = [Series("private", private), Series("not private", own, "b")]
    beside = "; beside it the devices' own mean, not private" if own else ""
    story = f"{words} ends at {figure(private[-1][1])}, with its noise"
    title = f"DP metric {words} by round"
    note = f"Mean over the devices with the noise that the plan pays for{beside}."
    return [card(title, note, _chart(title, series, words, story))]


def _chart(title: str, series: list[Series], label: str, story: str) -> Markup:
    values = [value for one in series for _, value in one.points]
    y = Axis(label, log=suits_log(values), from_zero=True)
    return line_chart(series, title=title, description=story, x=ROUNDS, y=y, height=250.0)
