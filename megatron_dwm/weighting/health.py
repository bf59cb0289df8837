"""Checks of weights, scores and alignments for signs that the weighting does not work.

A warning is a line in the log and a record of kind ``health`` in the JSON lines; the run continues. What would make
every further update meaningless (alignments that are not finite, or all zero, or replicas that differ) ends it instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dwm.errors import UserError
from megatron_dwm.weighting.weights import WeightStatistics


@dataclass(frozen=True)
class HealthWarning:
    """A warning that the user should look at."""

    sign: str
    """Short name, for records."""
    message: str
    """The finding and the remedy, on one line."""


def check_weights(sample_weights: torch.Tensor, floor: float) -> list[HealthWarning]:
    """Warn of a batch whose weights have collapsed onto few samples.

    Args:
        sample_weights: weights of the batch [N], with mean 1.
        floor: lowest effective sample size, as a fraction of the batch (``--dwm-min-effective-sample-size``).
    """
    effective = WeightStatistics.of(sample_weights).effective_sample_size
    if effective >= floor:
        return []
    return [
        HealthWarning(
            "collapsed weights",
            f"the weights have an effective sample size of {effective:.3f} of the batch, under "
            f"--dwm-min-effective-sample-size {floor:g}; raise --dwm-kl-weight or --dwm-temperature",
        )
    ]


def check_scores(scores: torch.Tensor, updates: int) -> list[HealthWarning]:
    """Warn of a weighter that gives all samples of a batch the same score although it has been updated.

    Args:
        scores: scores of the batch [N].
        updates: outer updates of the weighter before it scored this batch.
    """
    if updates == 0 or len(scores) < 2 or float(scores.max() - scores.min()) > 0:
        return []
    return [
        HealthWarning(
            "equal scores",
            f"after {updates} outer updates the weighter still scores all samples alike; raise --dwm-lr, or start it "
            "from a model that can distinguish them (--dwm-init-from)",
        )
    ]


def require_alignments(alignments: torch.Tensor) -> None:
    """Refuse alignments from which nothing can be learned.

    Raises:
        UserError: all alignments [N] are exactly zero: no parameter has a gradient both from them and from the target.
    """
    if not bool(alignments.any()):
        raise UserError(
            "the alignments of all samples with the target set are exactly zero, so that the weighter cannot learn; "
            "no parameter has a gradient from both: check the target set (--dwm-target-data-path, --eod-mask-loss) "
            "and the initial weights (--init-method-std)"
        )
