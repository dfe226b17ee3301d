"""What server and nodes say to each other, independent of the transport.

A node hosts one or more devices and keeps the current model. The server's broadcast of round t carries only what
changed since the round before (a *patch*); a node that missed a round, or that has just started, answers `stale` and
gets the whole vector once.

Each message is a frozen dataclass of arrays and scalars, told by their types apart (`fedlm.codec.split` and `join`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlm.codec import coded
from fedlm.trainable.spec import RowIds, Vector

EMPTY_IDS: RowIds = np.empty(0, np.int64)
EMPTY_VECTOR: Vector = np.empty(0, np.float32)
FROM_SCRATCH = -1
NOT_FINITE = "update not finite"  # the cause of a failure when an update holds NaN or infinity


@coded
@dataclass(frozen=True)
class Broadcast:
    """The server's state for one round, the same for all nodes.

    Arguments:
        run: Name of the run; a node serves one run at a time.
        from_version: Rounds that a node must have applied for the patch to fit; FROM_SCRATCH fits any node.
        to_version: Rounds applied after the patch.
        patch_blocks: Names of the blocks in the patch; empty for all.
        patch_rows: Row ids (S',) of the patch; empty for a whole vector.
        patch: The values (P',) of those blocks, of tables those rows.
        moves: Names of the blocks that devices train in this round; empty for all.
        sends: Names of the blocks that they send; empty for all that they train.
        row_ids: This round's public row set (S,).
        key: The round's key (`fedlm.randomness.round_key`); empty in an evaluation, which opens no round.
        noise_std: Of a coordinate of the round's noised mean; 0 without noise.
    """

    run: str
    from_version: int
    to_version: int
    patch_blocks: list[str]
    patch_rows: RowIds
    patch: Vector
    moves: list[str]
    sends: list[str]
    row_ids: RowIds
    key: bytes
    noise_std: float


@coded
@dataclass(frozen=True)
class TrainRequest:
    """Train these devices and add their clipped updates to the node's partial sum.

    Arguments:
        devices: Device ids (U,), group after group.
        group_sizes: (K,) devices of each group; a group trains together, and its bits depend on who is in it.
        clip_spec: What to clip with, and what else to ask a device: a `fedlm.privacy.clipping.clip_spec.ClipSpec` as
            text.
        work_item: Number of this work item in the round.
        sum_name: Names the partial sum. A node keeps one; a request with another name begins a new one.
        flush: Send the partial sum along with the reply.
    """

    devices: RowIds
    group_sizes: RowIds
    clip_spec: str
    work_item: int = 0
    sum_name: str = ""
    flush: bool = True


@coded
@dataclass(frozen=True)
class TrainReply:
    """What became of a work item's devices, as far as the simulation may look at it; the updates are in the partial
    sum.

    Arguments:
        stale: The node could not apply the patch and did nothing.
        devices: (U,) devices that trained.
        non_private_norms: (U,) L2 norms before clipping. Simulation only, not private.
        non_private_losses: (U,) training losses. Simulation only, not private.
        failed: (F,) devices that contributed zero.
        causes: (F,) why, one line each.
        peak_mb: Peak resident memory of the node's process so far, MB.
    """

    stale: bool
    devices: RowIds
    non_private_norms: npt.NDArray[np.float64]
    non_private_losses: npt.NDArray[np.float64]
    failed: RowIds
    causes: list[str]
    peak_mb: float


@coded
@dataclass(frozen=True)
class FlushRequest:
    """Send the partial sum of this name, and keep nothing of it."""

    sum_name: str


@coded
@dataclass(frozen=True)
class PartialSum:
    """What a node held: the sum over whole work items, and which ones.

    Arguments:
        work_items: (K,) numbers of the work items; empty when the node holds no sum of the name asked for.
        total: (P,) fixed-point sum of clipped updates (`fedlm.privacy.clipping.clipped_sum`); empty with `work_items`.
        num_devices: Devices in the sum, those that contributed zero included.
    """

    work_items: RowIds
    total: npt.NDArray[np.int64]
    num_devices: int


@coded
@dataclass(frozen=True)
class EvaluateRequest:
    """Score the text of these held-out users (indices into the token store)."""

    users: RowIds


@coded
@dataclass(frozen=True)
class EvaluateReply:
    """Sums of `fedlm.losses.evaluation.Score`."""

    stale: bool
    nll: float
    num_tokens: int
    num_bytes: int
    log_z: float
    log_z_squared: float
    metrics: list[float]
