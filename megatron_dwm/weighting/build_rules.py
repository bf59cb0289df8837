"""Builds, from the flags, the rules of mode ``rule`` that train no weighter."""

from __future__ import annotations

from functools import partial

from megatron_dwm.model.flops import training_flops
from megatron_dwm.weighting.bilevel.lm_gradients import LMGradients
from megatron_dwm.weighting.context import WeightingContext
from megatron_dwm.weighting.flops import forward_flops, outer_update_flops
from megatron_dwm.weighting.rules import (
    LossWeighting,
    OracleWeighting,
    RandomHalfWeighting,
    RandomWeighting,
    SourceWeighting,
    high_loss_scores,
    linupper_scores,
)
from megatron_dwm.weighting.scored import ScoredWeighting, ScoringOptions
from megatron_dwm.weighting.targeted import (
    SimilarityWeighting,
    SourceAlignmentWeighting,
    TargetedParts,
    TopAlignmentWeighting,
)
from megatron_dwm.weighting.weight_metrics import WeightMetrics


def build_rule(
    context: WeightingContext, lm_gradients: LMGradients, weight_metrics: WeightMetrics, options: ScoringOptions
) -> ScoredWeighting:
    """Return the weighting for ``--dwm-rule``.

    Args:
        context: the parts of the run.
        lm_gradients: the passes that compute alignments.
        weight_metrics: computes the metrics of each step's weights.
        options: how scores become weights.

    Raises:
        UserError: flags that do not fit the data.
    """
    settings, sizes = context.settings, context.sizes
    strength, sources = settings.dwm_rule_strength, settings.dwm_rule_sources or []
    match settings.dwm_rule:
        case "random":
            return RandomWeighting(weight_metrics, options, strength, context.seed)
        case "half":
            return RandomHalfWeighting(weight_metrics, options, settings.dwm_rule_seed)
        case "loss" | "linupper" as name:
            scores_of = linupper_scores if name == "linupper" else partial(high_loss_scores, strength=strength)
            flops = _forward_flops(context, sizes.global_batch_size)
            return LossWeighting(weight_metrics, options, scores_of, context.engine, sizes.micro_batch_size, flops)
        case "source-weights":
            return SourceWeighting(weight_metrics, options, sources, settings.dwm_rule_weights or [])
        case "similarity":
            parts = _parts(context, lm_gradients, is_forward=True)
            return SimilarityWeighting(weight_metrics, options, parts, strength)
        case "source-alignment":
            parts = _parts(context, lm_gradients)
            kl_weight, clip = settings.dwm_kl_weight, settings.dwm_clip_alignment
            return SourceAlignmentWeighting(weight_metrics, options, parts, kl_weight, clip)
        case "top-alignment":
            parts = _parts(context, lm_gradients)
            return TopAlignmentWeighting(weight_metrics, options, parts, settings.dwm_rule_fraction)
        case _:
            return OracleWeighting(weight_metrics, options, sources)


def _parts(context: WeightingContext, lm_gradients: LMGradients, *, is_forward: bool = False) -> TargetedParts:
    model, sizes, vocab = context.model, context.sizes, context.padded_vocab_size
    if is_forward:
        target, batch = (_forward_flops(context, size) for size in (sizes.target_batch_size, sizes.global_batch_size))
    else:
        target = training_flops(model, vocab, sizes.target_batch_size)
        batch = outer_update_flops(model, context.settings, sizes, vocab, weighter_parameters=0) - target
    return TargetedParts(
        context.engine, lm_gradients, context.make_target_loader, sizes.micro_batch_size, batch, target
    )


def _forward_flops(context: WeightingContext, samples: int) -> float:
    return forward_flops(context.model, context.padded_vocab_size, samples)
