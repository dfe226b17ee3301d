"""What one round tells: outcomes for the ledger, and diagnostics that only a simulation may see."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from fedlm.messages import TrainReply
from fedlm.privacy.plan import PrivacyPlan

NOT_FINITE = "update not finite"  # what a client reports when an update holds NaN or infinity


class CohortReport:
    """Collects the outcome of a cohort's devices.

    Arguments:
        num_sampled: Devices in the cohort.
    """

    def __init__(self, num_sampled: int) -> None:
        self.num_sampled = num_sampled
        self._seen: list[tuple[int, float, float]] = []  # (device, norm, loss)
        self._failed: dict[int, str] = {}

    @property
    def num_trained(self) -> int:
        """Devices whose update is in the sum."""
        return len(self._seen)

    @property
    def done(self) -> int:
        """Devices that have answered."""
        return len(self._seen) + len(self._failed)

    def add(self, reply: TrainReply) -> None:
        """Take in a node's reply."""
        self._seen += zip(
            reply.devices.tolist(), reply.non_private_norms.tolist(), reply.non_private_losses.tolist(), strict=True
        )
        self._failed |= dict(zip(reply.failed.tolist(), reply.causes, strict=True))

    def warning(self, t: int) -> str:
        """Return what to tell the user when a whole cohort failed; empty otherwise."""
        if self._seen or not self._failed:
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
        }
        return [*failures, summary]

    def non_private(self, plan: PrivacyPlan) -> dict[str, Any]:
        """Return diagnostics computed from raw updates; a real deployment has no right to them."""
        _, norms, losses = np.array(sorted(self._seen)).reshape(-1, 3).T
        if not len(norms):
            return {
                "train_loss": None,
                "client_norm_median": None,
                "client_norm_p90": None,
                "clip_fraction": None,
            }
        return {
            "train_loss": float(losses.mean()),
            "client_norm_median": float(np.median(norms)),
            "client_norm_p90": float(np.quantile(norms, 0.9)),
            "clip_fraction": float((norms > plan.clip_norm).mean()) if plan.enabled else 0.0,
        }


def json_number(value: float) -> float | None:
    """Return the number, or None where JSON has none (infinity, NaN)."""
    return value if math.isfinite(value) else None
