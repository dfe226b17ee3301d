"""What one round tells: outcomes for the ledger, and diagnostics that only a simulation may see."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from fedlm.messages import NOT_FINITE, TrainReply


class CohortReport:
    """Collects the outcome of a cohort's devices.

    Arguments:
        num_sampled: Devices in the cohort.
        clip_norm: The round's; infinite without clipping.
    """

    def __init__(self, num_sampled: int, clip_norm: float) -> None:
        self.num_sampled, self._clip_norm = num_sampled, clip_norm
        self.figures: dict[str, float] = {}  # of the grid
        self._replies: dict[int, TrainReply] = {}  # by piece

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

    def add(self, piece: int, reply: TrainReply) -> None:
        """Take in a node's reply, in place of an earlier one to a piece that was done again."""
        self._replies[piece] = reply

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
        replies = self._replies.values()
        devices, norms, losses = (
            np.concatenate([np.empty(0), *(getattr(reply, name) for reply in replies)])
            for name in ("devices", "non_private_norms", "non_private_losses")
        )
        if not len(norms):
            return {}
        losses = losses[np.argsort(devices)]  # a mean depends on the order, and the order must not on the nodes
        return {
            "train_loss": float(losses.mean()),
            "client_norm_median": float(np.median(norms)),
            "client_norm_p90": float(np.quantile(norms, 0.9)),
            "clip_fraction": float((norms > self._clip_norm).mean()),
        }


def json_number(value: float) -> float | None:
    """Return the number, or None where JSON has none (infinity, NaN)."""
    return value if math.isfinite(value) else None
