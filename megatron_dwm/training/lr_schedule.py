"""The schedule of learning rate and weight decay; megatron-core counts it in samples."""

from __future__ import annotations

from typing import Any

from megatron_dwm.config.training import OptimizerConfig, TrainingConfig


def build_scheduler(settings: OptimizerConfig, training: TrainingConfig, global_batch_size: int, optimizer: Any) -> Any:
    """Build megatron-core's schedule for ``optimizer``."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    warmup: float
    if training.train_iters is not None:
        total = training.train_iters * global_batch_size
        decay = (settings.lr_decay_iters or training.train_iters) * global_batch_size
        warmup = settings.lr_warmup_iters * global_batch_size
        wsd = settings.lr_wsd_decay_iters * global_batch_size if settings.lr_wsd_decay_iters is not None else None
    else:
        assert training.train_samples is not None
        total = training.train_samples
        decay = settings.lr_decay_samples or total
        warmup, wsd = settings.lr_warmup_samples, settings.lr_wsd_decay_samples
    if settings.lr_warmup_fraction is not None:
        warmup = settings.lr_warmup_fraction * decay
    constant = settings.weight_decay_incr_style == "constant"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay if constant else settings.start_weight_decay,
        end_wd=settings.weight_decay if constant else settings.end_weight_decay,
        wd_incr_steps=total,
        wd_incr_style=settings.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=settings.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=settings.override_opt_param_scheduler,
        wsd_decay_steps=wsd,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )
