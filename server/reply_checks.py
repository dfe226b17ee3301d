"""Checks of what nodes reply, where it arrives: a node may be of another version, broken, or dishonest.

What is refused here is only what no honest node can send, whatever its devices' data are: a round is never repeated,
and no node left out, because of data (PRIVACY.md rule 3). So a training loss may be infinite or NaN, an update that is
not finite is a failed device, and one device's sum that is too long is clipped (`fedlm.privacy.clipping.clipped_sum`),
not refused.

A lie that has the right form cannot be seen: what it can do is bounded by the clip norm of the devices asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import RecordDict

from fedlm.data.store import TokenStore
from fedlm.errors import DataError
from fedlm.flower_records import from_records
from fedlm.messages import EvaluateReply, EvaluateRequest, PartialSum, TrainReply, TrainRequest

Reply = TypeVar("Reply", TrainReply, PartialSum, EvaluateReply)

MAX_TEXT = 300
"""Characters that are kept of a text which a node has sent."""

_LARGEST_SCORE = 1e100  # honest sums of fp32 figures and of their squares are below 1e90


def plain_line(text: object) -> str:
    """Return a node's text as one printable line of at most `MAX_TEXT` characters, for ledger and screen."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:MAX_TEXT]).strip()


def _read(cls: type[Reply], name: str, content: RecordDict) -> Reply:
    """Return a reply whose arrays are vectors (n,)."""
    reply = from_records(cls, name, content)
    for field in fields(cast(Any, cls)):
        value = getattr(reply, field.name)
        if isinstance(value, np.ndarray) and value.ndim != 1:
            raise DataError(f"{cls.__name__}.{field.name} has the shape {value.shape}, must be a vector")
    return reply


def read_train_reply(request: TrainRequest, content: RecordDict) -> TrainReply:
    """Return a node's answer to a work item, its causes cut to plain lines.

    Raises:
        DataError: Not a TrainReply, or one about other devices than those asked for, or figures that nobody can have.
    """
    reply = _read(TrainReply, "reply", content)
    num_trained, num_failed = len(reply.devices), len(reply.failed)
    told = np.concatenate([reply.devices, reply.failed])
    if len(told) > len(request.devices) or len(np.unique(told)) < len(told) or not _within(told, request.devices):
        raise DataError(f"the reply names {len(told):,} devices that are not those asked for, each at most once")
    lengths = (len(reply.non_private_norms), len(reply.non_private_losses))
    if lengths not in {(0, 0), (num_trained, num_trained)} or len(reply.causes) != num_failed:
        raise DataError(
            f"the reply has {lengths} norms and losses for {num_trained:,} trained devices and "
            f"{len(reply.causes):,} causes for {num_failed:,} failed ones"
        )
    norms = reply.non_private_norms
    if not (np.isfinite(norms) & (norms >= 0)).all():
        raise DataError("the reply has a norm that is negative or not finite")
    if not 0 <= reply.peak_mb < math.inf:
        raise DataError(f"the reply has peak_mb = {reply.peak_mb}, must be finite and at least 0")
    return replace(reply, causes=[plain_line(cause) for cause in reply.causes])


def read_sum(asked: Sequence[tuple[int, TrainRequest]], content: RecordDict) -> PartialSum:
    """Return a node's sum; the vector itself is checked by the sum that it is added to (`ClippedSum.add_arrays`).

    Arguments:
        asked: Number and request of each work item that the node was asked for.
        content: The reply.

    Returns:
        A sum of work items asked for, each at most once; fewer when the node no longer has them.

    Raises:
        DataError: Not such a sum.
    """
    partial = _read(PartialSum, "sum", content)
    numbers = [number for number, _ in asked]
    if len(np.unique(partial.work_items)) < len(partial.work_items) or not _within(partial.work_items, numbers):
        raise DataError(
            f"the node's sum holds {len(partial.work_items):,} work items that are not those asked for, each once"
        )
    num_asked = sum(len(request.devices) for _, request in asked)
    if not 0 <= partial.num_devices <= num_asked:
        # The bound on a sum's norm grows with its devices: their number is not the node's to say.
        raise DataError(f"the node's sum claims {partial.num_devices:,} devices, it was asked for {num_asked:,}")
    return partial


def evaluation_reader(store: TokenStore, num_sums: int) -> Callable[[EvaluateRequest, RecordDict], EvaluateReply]:
    """Return what reads a node's scores of held-out users, whose tokens and bytes the server knows.

    Arguments:
        store: The corpus that the users of the requests are in.
        num_sums: Numbers that the further metrics of the evaluation add up.
    """

    def read(request: EvaluateRequest, content: RecordDict) -> EvaluateReply:
        reply = _read(EvaluateReply, "reply", content)
        if reply.stale:
            return reply
        num_targets = int(np.maximum(store.num_tokens[request.users] - 1, 0).sum())
        num_bytes = int(store.num_bytes[request.users].sum())
        if (reply.num_tokens, reply.num_bytes) != (num_targets, num_bytes):
            raise DataError(
                f"the scores are of {reply.num_tokens:,} tokens and {reply.num_bytes:,} bytes, "
                f"asked for were {num_targets:,} and {num_bytes:,}"
            )
        for name in ("nll", "log_z", "log_z_squared"):
            if not abs(getattr(reply, name)) <= _LARGEST_SCORE:
                raise DataError(f"the score has {name} = {getattr(reply, name)}, must be finite")
        if len(reply.metrics) not in ({0, num_sums} if not num_targets else {num_sums}):
            raise DataError(f"the score has {len(reply.metrics):,} sums of further metrics, asked for: {num_sums:,}")
        return reply

    return read


def _within(found: Any, allowed: Any) -> bool:
    return bool(np.isin(found, allowed).all())
