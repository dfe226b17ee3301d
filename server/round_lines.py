"""What a run tells of its rounds: lines for ledger and metrics, and diagnostics that only a simulation may see."""

from __future__ import annotations

import math
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from fedlm.config.load import config_hash
from fedlm.config.schema import Config
from fedlm.losses.evaluation import Score
from fedlm.losses.metrics import evaluation_figures
from fedlm.messages import NOT_FINITE, TrainReply
from fedlm.privacy.adaptive.rule import AdaptiveState
from fedlm.privacy.clipping.clipped_sum import ClippedSum
from fedlm.privacy.plan import PrivacyPlan
from fedlm.privacy.release import Release
from fedlm.trainable.spec import UpdateSpec
from server.round import Round, RoundOpener


class CohortReport:
    """Collects the outcome of a cohort's devices.

    Arguments:
        num_sampled: Devices in the cohort.
        clip_norm: The round's; infinite without clipping.
    """

    def __init__(self, num_sampled: int, clip_norm: float) -> None:
        self.num_sampled, self._clip_norm = num_sampled, clip_norm
        self.figures: dict[str, float] = {}  # of the grid
        self._replies: dict[int, TrainReply] = {}  # by work item

    @property
    def num_trained(self) -> int:
        """Devices whose update is in the sum."""
        return sum(len(reply.devices) for reply in self._replies.values())

    @property
    def done(self) -> int:
        """Devices that have answered."""
        return self.num_trained + len(self._failed)

    @property
    def _failed(self) -> dict[int, str]:
        """Why, by device."""
        replies = self._replies.values()
        return {
            device: cause
            for reply in replies
            for device, cause in zip(reply.failed.tolist(), reply.causes, strict=True)
        }

    def add(self, work_item: int, reply: TrainReply) -> None:
        """Take in a node's reply, in place of an earlier one to a work item that was done again."""
        self._replies[work_item] = reply

    def warning(self, t: int) -> str:
        """Return what to tell the user when a whole cohort failed; empty otherwise."""
        if self.num_trained or not self._failed:
            return ""
        cause, count = Counter(self._failed.values()).most_common(1)[0]
        fix = "; lower local.learning_rate and local.row_learning_rate" if cause == NOT_FINITE else ""
        return f"round {t}: none of {self.num_sampled} devices trained: {cause} ({count} of them){fix}"

    def ledger_lines(self, t: int, bytes_up: int, bytes_down: int, seconds: float) -> list[dict[str, Any]]:
        """Return the round's ledger lines: one for each failed device, one for the round."""
        failures = [
            {"event": "device_failed", "round": t, "device": device, "cause": cause}
            for device, cause in sorted(self._failed.items())
        ]
        summary = {
            "event": "round",
            "round": t,
            "sampled": self.num_sampled,
            "trained": self.num_trained,
            "failed": dict(Counter(cause.partition(":")[0] for cause in self._failed.values())),
            "bytes_up": bytes_up,
            "bytes_down": bytes_down,
            "seconds": round(seconds, 3),
            "worker_peak_mb": round(max((reply.peak_mb for reply in self._replies.values()), default=0.0), 1),
            **self.figures,
        }
        return [*failures, summary]

    def non_private(self) -> dict[str, Any]:
        """Return diagnostics computed from raw updates, which a real deployment has no right to; empty if none told."""
        replies = [r for r in self._replies.values() if len(r.non_private_losses) == len(r.devices)]
        devices, norms, losses = (
            np.concatenate([np.empty(0), *(getattr(reply, name) for reply in replies)])
            for name in ("devices", "non_private_norms", "non_private_losses")
        )
        if not len(norms):
            return {}
        losses = losses[np.argsort(devices)]  # a mean depends on the order, and the order must not on the nodes
        with np.errstate(all="ignore"):  # a diverged device's loss may be anything
            return {
                "train_loss": json_number(float(losses.mean())),
                "client_norm_median": json_number(float(np.median(norms))),
                "client_norm_p90": json_number(float(np.quantile(norms, 0.9))),
                "clip_fraction": float((norms > self._clip_norm).mean()),
            }


def json_number(value: float) -> float | None:
    """Return the number, or None where JSON has none (infinity, NaN)."""
    return value if math.isfinite(value) else None


class RunLines:
    """Writes down what happens to one run, in seconds of the whole run, interruptions left out.

    Arguments:
        config, plan, rounds: Of the run.
        stamps: What stands beside every epsilon.
    """

    def __init__(self, config: Config, plan: PrivacyPlan, rounds: RoundOpener, stamps: Sequence[str]) -> None:
        self._stamps = list(stamps)
        self._config, self._plan, self._rounds = config, plan, rounds
        self._seconds_before, self._started = 0.0, time.monotonic()
        self.peak_mb = 0.0

    def continue_after(self, seconds: float) -> None:
        """Count on from the seconds that an interrupted run took."""
        self._seconds_before = seconds

    def start(self, spec: UpdateSpec, privacy: Mapping[str, Any], fleet: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ledger's first line; `spec` is what the first round sends."""
        return {
            "event": "start",
            "time": now(),
            "versions": _versions(),
            "machine": f"{platform.system()} {platform.machine()}, {platform.processor() or 'cpu'}",
            "config_hash": config_hash(self._config),
            "clip_norm": json_number(self._plan.clip_norm),
            "blocks": [{"kind": b.kind, "name": b.name, "bytes": 4 * b.size} for b in spec.blocks],
            "privacy": dict(privacy),
            "fleet": dict(fleet),
        }

    def end(self, status: str, num_steps: int, num_released: int) -> dict[str, Any]:
        """Return the ledger's last line."""
        return {"event": "end", "status": status, "round": num_steps, **self._realised(num_released),
                "peak_device_mb": round(self.peak_mb, 1), "seconds": round(self._seconds(), 3)}  # fmt: skip

    def ledger(self, opened: Round, total: ClippedSum, report: CohortReport, seconds: float) -> list[dict[str, Any]]:
        """Return a round's ledger lines: one for each device that failed, one for the round."""
        participation = opened.participation
        up, down = int(participation.bytes_up.sum()), int(participation.bytes_down.sum())
        *failures, summary = report.ledger_lines(opened.number, up, down, seconds)
        summary |= {"reclipped": total.num_reclipped} if total.num_reclipped else {}
        return [*failures, participation.complete(summary)]

    def metrics(
        self, opened: Round, release: Release, report: CohortReport, state: AdaptiveState, seconds: float
    ) -> dict[str, Any]:
        """Return what metrics.jsonl says of a round before its evaluation; `state` is that of the round."""
        virtual = opened.participation.time
        return {
            "round": opened.number,
            "seconds": round(self._seconds(), 3),
            "round_seconds": round(seconds, 3),
            "devices": report.num_trained,
            "epsilon": json_number(self._plan.epsilon(opened.number)),
            "stamps": self._stamps,
            "update_norm": float(np.linalg.norm(release.mean)),
            **self._privacy(release, state),
            "megabytes_up": self._rounds.bytes_up / 1e6,
            "megabytes_down": self._rounds.bytes_down / 1e6,
            "non_private": report.non_private(),
            **({"virtual_hours": virtual.end_s / 3600} if virtual else {}),
        }

    def evaluated(
        self, metrics: Mapping[str, Any] | None, diagnostics: Mapping[str, float | None], score: Score | None
    ) -> dict[str, Any]:
        """Return a line of metrics.jsonl; without metrics that of the base."""
        nothing = {"devices": 0, "epsilon": 0.0, "stamps": self._stamps}
        line = metrics or {"round": 0, "seconds": round(self._seconds(), 3), **nothing}
        names = ("perplexity", "bits_per_byte", "log_z_mean", "log_z_std")
        scores = {name: getattr(score, name, None) for name in names}
        further = evaluation_figures(self._config.evaluation, score.metrics) if score and score.metrics else {}
        finite = {name: json_number(value) for name, value in further.items()}
        return {**diagnostics, **line, **scores, **({"evaluation": finite} if finite else {})}

    def announcement(self, line: Mapping[str, Any], num_devices: int) -> dict[str, Any]:
        """Return the progress event of a finished round, whose speed leaves evaluation out."""
        return {
            "event": "round",
            "round": line["round"],
            "rounds": self._config.rounds,
            "perplexity": line["perplexity"],
            "epsilon": line["epsilon"],
            "stamps": line["stamps"],
            "megabytes": line["megabytes_up"] + line["megabytes_down"],
            "devices_per_second": num_devices / max(line["round_seconds"], 1e-3),
        }

    def _privacy(self, release: Release, state: AdaptiveState) -> dict[str, Any]:
        """Return what a round's metrics say of its privacy beside epsilon: all of it released or public."""
        if not self._plan.enabled:
            return {}
        allocated = {"scales": list(state.allocation.scales)} if state.allocation else {}
        metrics = self._plan.adaptive_rule.metric_means(release)
        named = {name: json_number(value) for name, value in metrics.items()}
        return {"clip_norm": state.clip_norm, **allocated, **({"dp_metrics": named} if named else {})}

    def _realised(self, num_releases: int) -> dict[str, Any]:
        """Return the participation that the ledger saw and the epsilon that follows from it."""
        if not self._plan.enabled or not num_releases:
            return {}
        ledger = self._rounds.ledger
        seen = {"separation": ledger.separation, "max_participations": ledger.max_participations}
        realised = self._plan.realised_epsilon(num_releases, **seen)
        stamped = {"epsilon_realised": realised, "stamps": self._stamps}
        return {**seen, **(stamped if math.isfinite(realised) else {})}

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("fedlm", "torch", "flwr", "ray", "peft", "dp-accounting"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def now() -> str:
    """Return the time (UTC) as the ledger writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
