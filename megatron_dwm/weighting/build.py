"""Builds the weighting of a run from the flags."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from megatron_dwm.data.batch import Batch
from megatron_dwm.errors import UserError, with_article
from megatron_dwm.safe_unpickling import DAMAGE, short_reason
from megatron_dwm.weighting.bilevel.gradient_check import check_at_start
from megatron_dwm.weighting.bilevel.gradient_mean import NO_MEAN, GradientMean
from megatron_dwm.weighting.bilevel.outer_update import OuterUpdate
from megatron_dwm.weighting.bilevel.source_offsets import SourceOffsets
from megatron_dwm.weighting.bilevel.weighting import BilevelFlops, BilevelParts, BilevelWeighting
from megatron_dwm.weighting.build_rules import build_rule
from megatron_dwm.weighting.context import WeightingContext, lm_gradients, scoring_options, weight_metrics
from megatron_dwm.weighting.flops import outer_update_flops, scoring_flops
from megatron_dwm.weighting.frozen import FrozenParts, FrozenWeighting
from megatron_dwm.weighting.ngram import MODEL_TYPE
from megatron_dwm.weighting.policy import SampleWeighting, State
from megatron_dwm.weighting.rules import ShuffledWeighting
from megatron_dwm.weighting.sample_gather import SampleGather
from megatron_dwm.weighting.saved_state import check_weighter_state
from megatron_dwm.weighting.uniform import UniformWeighting
from megatron_dwm.weighting.warmup import Start, WarmupWeighting
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weighter_builder import WeighterBuilder
from megatron_dwm.weighting.weighter_stages import weighter_stages

logger = logging.getLogger(__name__)


def build_weighting(context: WeightingContext) -> SampleWeighting:
    """Return the weighting for ``--dwm-mode``.

    Raises:
        UserError: flags that do not fit the data.
    """
    if context.settings.dwm_mode == "off":
        return UniformWeighting()
    return WarmupWeighting(context.stages, weight_metrics(context), _choose_start(context))


def check_gradients(context: WeightingContext, batch: Batch, target: Batch) -> None:
    """Compare the run's hypergradient with finite differences (``--dwm-check``); every rank calls it.

    Raises:
        UserError: on every rank, if they differ or there is nothing to check.
    """
    check_at_start(lm_gradients(context), SampleGather(context.partition, context.parallel_state), batch, target)


def _choose_start(context: WeightingContext) -> Start:
    """Return the function that builds the weighting after the warm-up."""
    if context.inputs is None:
        return _rule_start(context)
    builder, settings = WeighterBuilder(context, context.inputs), context.settings
    if settings.dwm_load is not None:
        return partial(_start_frozen, builder, settings.dwm_load)
    offsets = SourceOffsets(settings, context.paths.train_sources) if settings.dwm_source_offsets else None
    return partial(_start_bilevel, builder, offsets)


def _rule_start(context: WeightingContext) -> Start:
    rule = build_rule(context, lm_gradients(context), weight_metrics(context), scoring_options(context))

    def start(iteration: int, state: State) -> SampleWeighting:
        rule.load_state_dict(state)
        logger.info(f" > weighting starts at iteration {iteration}: the rule {context.settings.dwm_rule}")
        return rule

    return start


def _start_frozen(builder: WeighterBuilder, load: str, iteration: int, state: State) -> SampleWeighting:
    context = builder.context
    parts = FrozenParts(
        weighter_stages("--dwm-load", load, context.stages.train_iters),
        builder.of_stage,
        builder.exporter(has_separate_tokenizer=True),
        context.settings.dwm_score_cache,
        partial(_scoring_flops, context),
    )
    weighting = FrozenWeighting(weight_metrics(context), scoring_options(context), parts, iteration)
    _announce(builder, iteration, weighting.weighter)
    weighting.load_state_dict(state)
    return weighting


def _start_bilevel(
    builder: WeighterBuilder, source_offsets: SourceOffsets | None, iteration: int, state: State
) -> SampleWeighting:
    is_restored = state.get("weighter") is not None
    if is_restored:
        with _reported_damage():
            check_weighter_state(state)
            weighter = builder.restored(state)
        _log_kept_architecture(builder, weighter)
    else:
        weighter = builder.new()
        if iteration > builder.context.stages.warmup_iters + 1:
            logger.warning(
                f"the checkpoint holds no weighter, so a new one starts at iteration {iteration}; to continue "
                "with an earlier one, give its export as --dwm-init-from"
            )
        _announce(builder, iteration, weighter)
    _log_source_offsets(source_offsets, state)
    weighting = _bilevel(builder, weighter, state.get("consumed_target_samples", 0), source_offsets)
    if is_restored:
        with _reported_damage():
            weighting.load_state_dict(state)
    return weighting


def _bilevel(
    builder: WeighterBuilder, weighter: Weighter, consumed_target_samples: int, source_offsets: SourceOffsets | None
) -> BilevelWeighting:
    """Return the weighting that trains ``weighter``, after ``consumed_target_samples``."""
    context, settings, momentum = builder.context, builder.settings, builder.settings.target_momentum
    gradient_mean = GradientMean(context.engine.chunks, momentum) if momentum > 0 else NO_MEAN
    passes = lm_gradients(context, gradient_mean)
    update_flops = outer_update_flops(
        context.model,
        settings,
        context.sizes,
        context.padded_vocab_size,
        weighter.num_active_parameters,
        is_linear=weighter.is_linear,
    )
    parts = BilevelParts(
        context.engine,
        weighter,
        OuterUpdate(settings, passes, weighter, SampleGather(context.partition, context.parallel_state)),
        context.make_target_loader(consumed_target_samples),
        builder.exporter(has_separate_tokenizer=bool(weighter.tokenizer_fingerprint)),
        BilevelFlops(_scoring_flops(context, weighter), update_flops),
        gradient_mean,
        source_offsets,
    )
    metrics, options = weight_metrics(context), scoring_options(context)
    if settings.dwm_mode == "rule":
        return ShuffledWeighting(metrics, options, parts, context.seed)
    return BilevelWeighting(metrics, options, parts)


def _scoring_flops(context: WeightingContext, weighter: Weighter) -> float:
    return scoring_flops(weighter.num_active_parameters, context.sizes.global_batch_size, context.model.seq_length)


def _log_kept_architecture(builder: WeighterBuilder, weighter: Weighter) -> None:
    """Log that a checkpoint's weighter is kept, if the flags specify another kind."""
    kind, arch = weighter.model.config.model_type, builder.settings.dwm_arch
    wanted = MODEL_TYPE if arch == "ngram" else arch
    if builder.settings.dwm_init_from == "random" and kind != wanted:
        logger.info(
            f" > the checkpoint's weighter, {with_article(kind)}, is kept; --dwm-arch {arch} applies only to a new one"
        )


def _log_source_offsets(source_offsets: SourceOffsets | None, state: State) -> None:
    """Log whether the offsets of sources begin or end with this run, if that changes the weights of a resumed one."""
    has_saved = state.get("source_offsets") is not None
    if has_saved and source_offsets is None:
        logger.warning(
            "the checkpoint's offsets of sources are not used, and not saved again; to keep them, give "
            "--dwm-source-offsets"
        )
    elif source_offsets is not None and state.get("weighter") is not None and not has_saved:
        logger.info(" > the checkpoint holds no offsets of sources: they start at 0")


def _announce(builder: WeighterBuilder, iteration: int, weighter: Weighter) -> None:
    kind, size, mode = type(weighter.model).__name__, weighter.num_parameters, builder.settings.dwm_mode
    logger.info(f" > weighting starts at iteration {iteration}: {kind} of {size} parameters, {mode}")
    if builder.inputs.folder is not None and builder.inputs.folder.reading:
        logger.info(f" > the weighter's samples: {builder.inputs.folder.reading}")


@contextmanager
def _reported_damage() -> Iterator[None]:
    """Report a damaged state in one line.

    Raises:
        UserError: the block failed as it does with a damaged state.
    """
    try:
        yield
    except DAMAGE as error:
        raise UserError(
            f"--load: the checkpoint's state of the weighting is damaged ({short_reason(error)}); give --ckpt-step of "
            "an earlier one"
        ) from None
