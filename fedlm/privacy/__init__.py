"""User-level differential privacy: one plan makes sampler, clip spec, mechanism and accounting together."""

from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.clipping.clipped_sum import ClippedSum, ClipRecord
from fedlm.privacy.plan import PrivacyPlan

__all__ = ["ClipRecord", "ClipSpec", "ClippedSum", "PrivacyPlan"]
