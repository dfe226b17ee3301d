"""What a training loss is: `loss.kind` names a class of `fedlm.registry.LOSSES`.

A loss of somebody's own needs `mean` alone. Local training, memory planning and the run follow from it; without a form
for groups of devices (`has_groups`) devices train one by one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from fedlm.config.keys import typed_options
from fedlm.config.schema import LossConfig
from fedlm.registry import LOSSES, NoOptions

if TYPE_CHECKING:
    from torch import Tensor


class Loss(ABC):
    """A training loss.

    Arguments:
        config: The section [loss].
    """

    Options: ClassVar[type] = NoOptions
    """What [loss.options] may hold: a frozen dataclass whose fields are made with `fedlm.config.schema.option`."""
    summary: ClassVar[str] = ""
    """The loss in words."""
    draws_negatives: ClassVar[bool] = True
    """Whether a step draws `loss.negatives` words; else every word of the vocabulary is in play."""
    has_groups: ClassVar[bool] = False
    """Whether `group_losses` is there, so that many devices train in one program; losses over negatives alone."""
    per_example: ClassVar[bool] = False
    """Whether example-level DP has its gradients of single examples (`fedlm.example_dp`)."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.options: Any = typed_options(type(self), config.options, LOSSES.options_key)

    @abstractmethod
    def mean(
        self,
        hidden: Tensor,
        targets: Tensor,
        negatives: Tensor | None,
        table: Tensor,
        bias: Tensor | None,
        log_expected: Tensor | None,
    ) -> Tensor:
        """Return the mean loss over tokens, from which the step's gradient follows.

        It is also called with tensors without values ("meta"), whose allocations tell what memory a step needs.

        Arguments:
            hidden: (N, D) final hidden states of real tokens.
            targets: (N,) rows of `table`.
            negatives: (K,) rows of `table`; None without `draws_negatives`.
            table: (L, D) output embedding rows in play; all of them without `draws_negatives`.
            bias: (L,) or None.
            log_expected: (L,) log(K q) of each row in play; None without `draws_negatives`.
        """

    def group_losses(
        self,
        hidden: Tensor,
        weights: Tensor,
        targets: tuple[Tensor, Tensor],
        negatives: tuple[Tensor, Tensor],
        ids: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return the loss of each device of a group, (G,), equal to `mean` up to rounding.

        Arguments:
            hidden: (G, N, D) hidden states.
            weights: (G, N) one over the device's number of targets; 0 at padding.
            targets: Each target's row (G, N, D), and its bias less the log of its expected count (G, N).
            negatives: The same of the negatives, (G, K, D) and (G, K).
            ids: The rows' numbers (G, N) and (G, K); equal numbers of one device are equal words.
        """
        raise NotImplementedError(f"{type(self).__name__} says has_groups but lacks group_losses")


class Nce(Loss):
    """Noise-contrastive estimation with log Z fixed at zero (`fedlm.losses.nce`)."""

    summary = "noise-contrastive estimation"
    has_groups = True
    per_example = True

    def mean(
        self,
        hidden: Tensor,
        targets: Tensor,
        negatives: Tensor | None,
        table: Tensor,
        bias: Tensor | None,
        log_expected: Tensor | None,
    ) -> Tensor:
        """Return `nce_loss`."""
        from fedlm.losses.nce import nce_loss

        assert negatives is not None
        assert log_expected is not None
        return nce_loss(hidden, targets, negatives, table, bias, log_expected)

    def group_losses(
        self,
        hidden: Tensor,
        weights: Tensor,
        targets: tuple[Tensor, Tensor],
        negatives: tuple[Tensor, Tensor],
        ids: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return `sampled_losses`."""
        from fedlm.losses.grouped import sampled_losses

        return sampled_losses("nce", hidden, weights, targets, negatives, None)


class SampledSoftmax(Loss):
    """Softmax over the target and the negatives that differ from it (`fedlm.losses.sampled_softmax`)."""

    summary = "softmax over the target and drawn negatives"
    has_groups = True
    per_example = True

    def mean(
        self,
        hidden: Tensor,
        targets: Tensor,
        negatives: Tensor | None,
        table: Tensor,
        bias: Tensor | None,
        log_expected: Tensor | None,
    ) -> Tensor:
        """Return `sampled_softmax_loss`."""
        from fedlm.losses.sampled_softmax import sampled_softmax_loss

        assert negatives is not None
        assert log_expected is not None
        return sampled_softmax_loss(hidden, targets, negatives, table, bias, log_expected)

    def group_losses(
        self,
        hidden: Tensor,
        weights: Tensor,
        targets: tuple[Tensor, Tensor],
        negatives: tuple[Tensor, Tensor],
        ids: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Return `sampled_losses`, a negative that equals the target masked."""
        from fedlm.losses.grouped import sampled_losses

        is_hit = ids[0][:, :, None] == ids[1][:, None, :]  # (G, N, K)
        return sampled_losses("sampled_softmax", hidden, weights, targets, negatives, is_hit)


class FullSoftmax(Loss):
    """Exact full-softmax cross-entropy in chunks of the vocabulary (`fedlm.losses.full_softmax`)."""

    summary = "exact softmax over the vocabulary"
    draws_negatives = False
    has_groups = True  # of a form of its own, `fedlm.training.grouped.whole_table` and `full_losses`
    per_example = True

    def mean(
        self,
        hidden: Tensor,
        targets: Tensor,
        negatives: Tensor | None,
        table: Tensor,
        bias: Tensor | None,
        log_expected: Tensor | None,
    ) -> Tensor:
        """Return `full_softmax_loss`."""
        from fedlm.losses.full_softmax import full_softmax_loss

        return full_softmax_loss(hidden, targets, table, bias, self.config.chunk)


def loss_of(config: LossConfig) -> Loss:
    """Return the loss that a config names.

    Raises:
        ConfigError: No such loss, or an option that it does not have.
    """
    loss: Loss = LOSSES.resolve(config.kind)(config)
    return loss
