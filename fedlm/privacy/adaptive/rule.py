"""What a plan adapts from round to round: clip norm, noise allocation, selected rows. All from releases alone.

`AdaptiveRule` is the frozen rule, part of the plan; `AdaptiveState` is what it knows after some rounds. A state is a
function of the first state and of released vectors, so a resumed run recomputes it from its journal, and no device's
data reaches it but through the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedlm.codec import coded
from fedlm.config.schema import OptionValue, OptionValues, PrivacyConfig, RowsConfig
from fedlm.errors import ConfigError
from fedlm.privacy.adaptive import allocation
from fedlm.privacy.adaptive.allocation import AllocationState
from fedlm.privacy.adaptive.clip_norm import bit_share, next_clip_norm
from fedlm.privacy.clipping.block_scaling import BlockScaling
from fedlm.privacy.clipping.clip_spec import ClipSpec
from fedlm.privacy.clipping.side_queries import ClipBit, DPMetrics, GroupShares, SideQuery, WordMap
from fedlm.privacy.release import Release
from fedlm.trainable.rows import sampler_of
from fedlm.trainable.spec import RowIds, UpdateSpec, Vector

Floats = npt.NDArray[np.float64]


@coded
@dataclass(frozen=True, eq=False)
class AdaptiveState:
    """What is known after some releases: public.

    Arguments:
        clip_norm: C of the next round.
        allocation: None for isotropic noise.
        word_scores: (V,) sum of the released word maps; None without row selection.
    """

    clip_norm: float
    allocation: AllocationState | None = None
    word_scores: Floats | None = None

    def __post_init__(self) -> None:
        """Check the clip norm."""
        if not self.clip_norm > 0:
            raise ConfigError(f"clip norm {self.clip_norm} must be > 0; restore the state")


@coded
@dataclass(frozen=True)
class AdaptiveRule:
    """The rule, from public numbers alone.

    Arguments:
        clip_norm: C of round 1.
        clip_quantile: gamma that C follows; 0: C stays.
        clip_learning_rate: eta.
        bit_share: Of the clip norm.
        allocation: One of `allocation.KINDS`.
        moments, importance: By kind of block, m_g and w_g of public users, up to factors; empty: none.
        noise_floor: Least part of the nominal noise that the form as published may go down to.
        metrics, metric_options: DP metrics, and what of their options is not the default (`name.option`, value).
        selection_rounds: First rounds that ask for the words of the devices; 0: none.
        selection_share: Of the clip norm, in those rounds.
        selection_threshold: Least score of a selected word, in standard deviations of its noise.
        row_count: Rows to select at most.
        vocabulary_size: V; 0 without row selection.
    """

    clip_norm: float
    clip_quantile: float = 0.0
    clip_learning_rate: float = 0.2
    bit_share: float = 0.0
    allocation: str = "isotropic"
    moments: tuple[tuple[str, float], ...] = ()
    importance: tuple[tuple[str, float], ...] = ()
    noise_floor: float = 0.5
    metrics: tuple[str, ...] = ()
    metric_options: tuple[tuple[str, OptionValue], ...] = ()
    selection_rounds: int = 0
    selection_share: float = 0.0
    selection_threshold: float = 0.0
    row_count: int = 0
    vocabulary_size: int = 0

    def __post_init__(self) -> None:
        """Check what the rule is read by: its kind."""
        if self.allocation not in allocation.KINDS:
            raise ConfigError(f"allocation {self.allocation!r} must be one of {', '.join(allocation.KINDS)}")

    @classmethod
    def create(
        cls,
        config: PrivacyConfig,
        *,
        noise_multiplier: float,
        expected_cohort: int,
        rows: RowsConfig | None = None,
        vocabulary_size: int = 0,
        moments: Mapping[str, float] | None = None,
        importance: Mapping[str, float] | None = None,
    ) -> AdaptiveRule:
        """Return the rule of an experiment.

        Arguments:
            config: The section [privacy].
            noise_multiplier: z.
            expected_cohort: n, as accounted.
            rows: The section [trainable.embedding_rows]; None without embedding rows.
            vocabulary_size: V.
            moments, importance: Public m_g and w_g by kind of block, for the public and the per-group allocation.
        """
        quantile = config.clip_quantile
        sampler = sampler_of(rows) if rows else None
        selection = sampler.options if sampler and sampler.selects else None
        share = bit_share(noise_multiplier=noise_multiplier, expected_cohort=expected_cohort, quantile=quantile)
        return cls(
            clip_norm=config.clip_norm,
            clip_quantile=quantile,
            clip_learning_rate=config.clip_learning_rate,
            bit_share=share if quantile else 0.0,
            allocation=config.allocation,
            moments=tuple(sorted((moments or {}).items())),
            importance=tuple(sorted((importance or {}).items())),
            noise_floor=config.noise_floor,
            metrics=config.metrics,
            metric_options=tuple(config.metric_options.items()),
            selection_rounds=selection.selection_rounds if selection else 0,
            selection_share=selection.selection_share if selection else 0.0,
            selection_threshold=selection.selection_threshold if selection else 0.0,
            row_count=rows.count if rows and selection else 0,
            vocabulary_size=vocabulary_size if selection else 0,
        )

    @property
    def changes_coordinates(self) -> bool:
        """Whether clip norm, scales or row set change during a run, which correlated noise cannot follow."""
        return bool(self.clip_quantile or self.selection_rounds or self.allocation in ("adaptive", "published"))

    def first_state(self, spec: UpdateSpec) -> AdaptiveState:
        """Return the state before round 1; `spec` is any round's."""
        scores = np.zeros(self.vocabulary_size) if self.selection_rounds else None
        if self.allocation == "isotropic":
            return AdaptiveState(self.clip_norm, word_scores=scores)
        sizes = allocation.group_sizes(spec)
        moments = [
            dict(self.moments).get(name, size) for name, size in zip(allocation.groups_of(spec), sizes, strict=True)
        ]
        scaled = self.allocation in ("public", "adaptive") and bool(self.moments)
        importance = self._public_importance(spec).tolist()
        start = AllocationState.start(moments, [int(size) for size in sizes], scaled=scaled, importance=importance)
        return AdaptiveState(self.clip_norm, start, scores)

    def clip_spec(self, state: AdaptiveState, spec: UpdateSpec, round_number: int) -> ClipSpec:
        """Return what round `round_number` clips with."""
        return ClipSpec(state.clip_norm, self._block_scaling(state, spec), self._side_queries(spec, round_number))

    def next(self, state: AdaptiveState, release: Release, *, clip_spec: ClipSpec, values: Vector) -> AdaptiveState:
        """Return the state after a release.

        Arguments:
            state, clip_spec: Of the released round.
            release: What left.
            values: (P,) the model's values in the round, in the coordinates of the release.
        """
        answers = release.answers
        if ClipBit.name in answers:
            excess = float(answers[ClipBit.name][0])
            rate = self.clip_learning_rate
            state = replace(state, clip_norm=next_clip_norm(state.clip_norm, excess=excess, learning_rate=rate))
        if WordMap.name in answers and state.word_scores is not None:
            state = replace(state, word_scores=state.word_scores + answers[WordMap.name])
        if state.allocation and self.allocation in ("adaptive", "published"):
            state = replace(state, allocation=self._allocate(state.allocation, release, clip_spec, values))
        return state

    def selected_rows(self, state: AdaptiveState, *, answer_std: float) -> RowIds:
        """Return the rows (S,) that the word maps chose: the highest scores above the threshold, at most `row_count`.

        Arguments:
            state: After the selection rounds.
            answer_std: Standard deviation of one released answer's coordinate.

        Returns:
            Sorted ids; empty when no score is above the threshold.
        """
        assert state.word_scores is not None, "no rows are selected without word maps"
        least = self.selection_threshold * answer_std * self.selection_rounds**0.5
        best = np.argsort(-state.word_scores, kind="stable")[: self.row_count]
        return np.sort(best[state.word_scores[best] > least]).astype(np.int64)

    def metric_means(self, release: Release) -> dict[str, float]:
        """Return the released DP metrics by name; empty without any."""
        side_queries = [side_query for side_query in self._metric_side_queries() if side_query.name in release.answers]
        return {
            key: value
            for side_query in side_queries
            for key, value in side_query.means(release.answers[side_query.name]).items()
        }

    def _block_scaling(self, state: AdaptiveState, spec: UpdateSpec) -> BlockScaling | None:
        allocated = state.allocation
        if allocated is None:
            return None
        spans = allocation.spans_of(spec)
        if self.allocation == "per_group":
            return allocation.per_group(spec, np.asarray(allocated.moments), self._public_importance(spec))
        if self.allocation == "published":
            sizes = allocation.group_sizes(spec)
            noise = allocation.published_noise(allocated.importance, sizes, floor=self.noise_floor)
            return BlockScaling(spans, allocated.scales, noise=tuple(float(value) for value in noise))
        return BlockScaling(spans, allocated.scales)

    def _public_importance(self, spec: UpdateSpec) -> Floats:
        """Return w_g (G,) as public users have it; ones where nothing is known."""
        return np.array([dict(self.importance).get(name, 1.0) for name in allocation.groups_of(spec)])

    def _side_queries(self, spec: UpdateSpec, round_number: int) -> tuple[SideQuery, ...]:
        side_queries: list[SideQuery] = []
        if self.clip_quantile:
            side_queries.append(ClipBit(self.bit_share, self.clip_quantile))
        if self.allocation == "adaptive":
            side_queries.append(GroupShares(allocation.SHARE, len(allocation.groups_of(spec))))
        if round_number <= self.selection_rounds:
            side_queries.append(WordMap(self.selection_share, self.vocabulary_size))
        return (*side_queries, *self._metric_side_queries())

    def _metric_side_queries(self) -> tuple[DPMetrics, ...]:
        if not self.metrics:
            return ()
        return (DPMetrics.of(self.metrics, OptionValues(dict(self.metric_options))),)

    def _allocate(
        self, state: AllocationState, release: Release, clip_spec: ClipSpec, values: Vector
    ) -> AllocationState:
        assert clip_spec.block_scaling is not None, "an allocation always has a block scaling"
        noise = np.asarray(clip_spec.block_scaling.scales) * np.asarray(clip_spec.block_scaling.noise or 1.0)
        nothing = np.zeros(len(state.scales))
        return allocation.updated(
            state,
            release.spec,
            values=values,
            mean=release.mean,
            noise_std=release.noise_std,
            noise=noise,
            shares=release.answers.get(GroupShares.name, nothing),
            adapts_scales=self.allocation == "adaptive",
        )
