"""What the example-level DP comparison is held to, as verdicts on its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.example_dp_models import MODELS

FULL_ROWS = ("fedlm full", "Opacus full, hooks", "Opacus full, ghost", "fastDP full")
BIAS_ROWS = ("plain bias", "plain bias, our head")
TIME, MEMORY = "step_s", "peak_mib"
Rows = Mapping[str, Mapping[str, float]]


def verdicts(kind: str, found: Mapping[str, Any], tolerance: float) -> Iterator[dict[str, Any]]:
    """Yield one verdict a target and length: a text, the value, its bound, and whether it is met.

    Arguments:
        kind: The model.
        found: Its "checks" by label and its "lengths" of rows.
        tolerance: A row further from the definition than this does not count as a peer.
    """
    checks = found["checks"]
    peers = [label for label in FULL_ROWS if checks.get(label, {}).get("difference", 1.0) <= tolerance]
    for length, rows in found["lengths"].items():
        where = f"{kind}, T {length}"
        yield from _bias_targets(where, rows, peers)
        if kind == "lm":
            yield from _phantom_targets(where, rows)


def _bias_targets(where: str, rows: Rows, peers: list[str]) -> Iterator[dict[str, Any]]:
    ours = rows["fedlm BiTFiT"]
    for label in (label for label in BIAS_ROWS if label in rows):
        yield _at_most(f"{where}: BiTFiT, time of {label!r}", ours[TIME] / rows[label][TIME], 1.05)
        yield _at_most(f"{where}: BiTFiT, memory of {label!r}", ours[MEMORY] / rows[label][MEMORY], 1.02)
    for field, what in ((TIME, "faster"), (MEMORY, "smaller")):
        best = min(peers, key=lambda label: rows[label][field])
        yield _at_least(f"{where}: BiTFiT, {what} than the best full DP ({best})", rows[best][field] / ours[field], 2.0)


def _phantom_targets(where: str, rows: Rows) -> Iterator[dict[str, Any]]:
    """The table's own memory: what training it adds, less the (V, D) sum that any training of it holds."""
    sizes = MODELS["lm"]
    table_mib = sizes.vocabulary * sizes.width * 4 / 2**20
    extra = rows["fedlm full"][MEMORY] - rows["fedlm, table frozen"][MEMORY] - table_mib
    per_example = sizes.num_examples * table_mib
    text = f"{where}: Phantom Clipping, memory ({extra:.0f} MiB) of per-example gradients ({per_example:.0f} MiB)"
    yield _at_most(text, extra / per_example, 0.1)
    hooks = rows["Opacus full, hooks"]
    yield _at_most(f"{where}: Phantom Clipping, time of Opacus hooks", rows["fedlm full"][TIME] / hooks[TIME], 1.0)


def _at_most(text: str, value: float, bound: float) -> dict[str, Any]:
    return _verdict(text, value, f"at most {bound}", value <= bound)


def _at_least(text: str, value: float, bound: float) -> dict[str, Any]:
    return _verdict(text, value, f"at least {bound}", value >= bound)


def _verdict(text: str, value: float, bound: str, is_met: bool) -> dict[str, Any]:
    line = f"{text}: {value:.3f}, {bound}: {'met' if is_met else 'MISSED'}"
    return {"text": line, "value": value, "bound": bound, "met": is_met}
