"""Flags of the optimizer: learning rate, weight decay, precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_dwm.config.flags import flag, flag_name, require_at_least, require_given
from megatron_dwm.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LrBounds:
    """Ends of the phases of the learning rate, in samples (or iterations)."""

    total: int
    """Length of the whole run."""
    decay: int
    """End of the decay, warm-up included."""
    warmup: float
    """End of the warm-up."""
    wsd_decay: int | None
    """Length of WSD's last phase, None if it is not given."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning rate and precision."""

    optimizer: Literal["adam", "sgd"] = flag("adam", "Optimizer: Adam with decoupled weight decay, or SGD.")
    lr: float = flag(None, "Peak learning rate.")
    min_lr: float = flag(0.0, "Lowest learning rate.")
    decoupled_lr: float | None = flag(None, "Learning rate of the embedding and output layers.")
    decoupled_min_lr: float | None = flag(None, "Lowest learning rate of the embedding and output layers.")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = flag(
        "linear", "Shape of the learning rate decay."
    )
    lr_decay_iters: int | None = flag(None, "Steps of the decay. Default: the whole run.")
    lr_decay_samples: int | None = flag(None, "Samples of the decay (with --train-samples).")
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = flag(
        "exponential", "Shape of WSD's last phase."
    )
    lr_wsd_decay_iters: int | None = flag(None, "Steps of WSD's last phase.")
    lr_wsd_decay_samples: int | None = flag(None, "Samples of WSD's last phase.")
    lr_warmup_fraction: float | None = flag(None, "Fraction of the decay that is linear warm-up.")
    lr_warmup_iters: int = flag(0, "Steps of linear warm-up.")
    lr_warmup_samples: int = flag(0, "Samples of linear warm-up (with --train-samples).")
    lr_warmup_init: float = flag(0.0, "Learning rate at the start of the warm-up.")
    override_opt_param_scheduler: bool = flag(
        False,
        "Take the schedule from the flags, not the checkpoint.",
        "--override-opt_param-scheduler",
        "--override-opt-param-scheduler",
        old_names=("--override-lr-scheduler",),
    )
    use_checkpoint_opt_param_scheduler: bool = flag(
        False,
        "Take the schedule from the checkpoint, not the flags.",
        "--use-checkpoint-opt_param-scheduler",
        "--use-checkpoint-opt-param-scheduler",
        old_names=("--use-checkpoint-lr-scheduler",),
    )
    weight_decay: float = flag(0.01, "Weight decay.")
    start_weight_decay: float | None = flag(None, "Weight decay at the start.")
    end_weight_decay: float | None = flag(None, "Weight decay at the end.")
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = flag(
        "constant", "How weight decay changes from start to end."
    )
    apply_wd_to_qk_layernorm: bool = flag(False, "Decay the weights of --qk-layernorm too.")
    no_weight_decay_cond_type: Literal["apply_wd_to_qk_layernorm"] | None = flag(
        None, "Former spelling of --apply-wd-to-qk-layernorm.", deprecated="use --apply-wd-to-qk-layernorm"
    )
    clip_grad: float = flag(1.0, "Clip the gradient to this global norm; 0 for no clipping.")
    adam_beta1: float = flag(0.9, "Adam's first decay rate.")
    adam_beta2: float = flag(0.999, "Adam's second decay rate.")
    adam_eps: float = flag(1e-8, "Adam's epsilon.")
    sgd_momentum: float = flag(0.9, "SGD's momentum.")
    fp16: bool = flag(False, "Train in fp16 with dynamic loss scaling.")
    bf16: bool = flag(False, "Train in bf16 with fp32 master weights.")
    loss_scale: float | None = flag(None, "Fixed loss scale instead of a dynamic one.")
    initial_loss_scale: float = flag(float(2**32), "Initial dynamic loss scale.")
    min_loss_scale: float = flag(1.0, "Lowest dynamic loss scale.")
    loss_scale_window: float = flag(1000, "Steps without overflow after which the loss scale is raised.")
    hysteresis: int = flag(2, "Overflows after which the loss scale is lowered.")
    accumulate_allreduce_grads_in_fp32: bool = flag(False, "Accumulate and reduce gradients in fp32.")
    grad_reduce_in_bf16: bool = flag(False, "Reduce gradients in bf16.")
    fp16_lm_cross_entropy: bool = flag(False, "Compute the cross entropy in fp16.")
    log_num_zeros_in_grad: bool = flag(False, "Count and log zeros in the gradient.")

    def __post_init__(self) -> None:
        require_given(self, "lr", "every run needs it")
        require_at_least(
            self,
            0,
            "lr min_lr decoupled_lr decoupled_min_lr lr_warmup_init lr_warmup_fraction lr_warmup_iters "
            "lr_warmup_samples lr_wsd_decay_iters lr_wsd_decay_samples "
            "weight_decay start_weight_decay end_weight_decay clip_grad adam_beta1 adam_beta2 adam_eps sgd_momentum "
            "loss_scale",
        )
        require_at_least(self, 1, "lr_decay_iters lr_decay_samples loss_scale_window hysteresis")
        self._check_learning_rates()
        self._check_weight_decay()
        if self.fp16 and self.bf16:
            raise UserError("--fp16 and --bf16 exclude each other; give one")
        for name in ("adam_beta1", "adam_beta2", "lr_warmup_fraction"):
            value = getattr(self, name)
            if value is not None and value >= 1:
                raise UserError(f"{flag_name(name)} {value}: must be less than 1")

    def _check_learning_rates(self) -> None:
        for name in ("min_lr", "lr_warmup_init"):
            if getattr(self, name) > self.lr:
                raise UserError(f"{flag_name(name)} {getattr(self, name)} exceeds --lr {self.lr}; lower it")
        if self.decoupled_min_lr is not None and self.decoupled_lr is None:
            raise UserError(f"--decoupled-min-lr {self.decoupled_min_lr} has no effect without --decoupled-lr; add it")
        if self.decoupled_lr is not None and (self.decoupled_min_lr or 0.0) > self.decoupled_lr:
            raise UserError(
                f"--decoupled-min-lr {self.decoupled_min_lr} exceeds --decoupled-lr {self.decoupled_lr}; lower it"
            )
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            raise UserError(
                "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler exclude each other; give one"
            )

    def _check_weight_decay(self) -> None:
        varying = (self.start_weight_decay, self.end_weight_decay)
        if self.weight_decay_incr_style != "constant" and None in varying:
            raise UserError(
                f"--weight-decay-incr-style {self.weight_decay_incr_style} needs --start-weight-decay and "
                "--end-weight-decay; give both"
            )
        if self.weight_decay_incr_style == "constant" and varying != (None, None):
            raise UserError(
                "--start-weight-decay and --end-weight-decay have no effect with --weight-decay-incr-style constant; "
                "give linear or cosine"
            )
        if (self.start_weight_decay or 0.0) > (self.end_weight_decay or 0.0):
            raise UserError(
                f"--start-weight-decay {self.start_weight_decay} exceeds --end-weight-decay {self.end_weight_decay}; "
                "weight decay can only grow, so change one"
            )

    @property
    def has_fp32_grads(self) -> bool:
        """Whether gradients are accumulated and reduced in fp32.

        As in Megatron-LM, bf16 training does so unless ``--grad-reduce-in-bf16`` is given.
        """
        return not self.grad_reduce_in_bf16 if self.bf16 else self.accumulate_allreduce_grads_in_fp32

    @property
    def should_decay_qk_layernorm(self) -> bool:
        """Whether weight decay applies to the weights of ``--qk-layernorm``."""
        return self.apply_wd_to_qk_layernorm or self.no_weight_decay_cond_type is not None

    @property
    def has_dynamic_loss_scale(self) -> bool:
        """Whether the loss scale is dynamic."""
        return self.fp16 and not self.loss_scale

    @property
    def params_dtype(self) -> torch.dtype:
        """The precision of the model's parameters and activations."""
        import torch

        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32

    @property
    def weight_decay_range(self) -> tuple[float, float]:
        """Weight decay at the start and at the end of the run."""
        start, end = self.start_weight_decay, self.end_weight_decay
        return (self.weight_decay, self.weight_decay) if start is None or end is None else (start, end)

    def lr_bounds(self, length: int, batch: int, *, is_in_samples: bool) -> LrBounds:
        """Return where the learning rate's phases end, in samples.

        Args:
            length: length of the run, in iterations or samples.
            batch: samples in one iteration; with 1, a run of iterations has its bounds in iterations.
            is_in_samples: whether the run and the phases are given in samples.
        """
        decay, warmup, wsd_decay = self.lr_decay_iters, self.lr_warmup_iters, self.lr_wsd_decay_iters
        if is_in_samples:
            batch = 1
            decay, warmup, wsd_decay = self.lr_decay_samples, self.lr_warmup_samples, self.lr_wsd_decay_samples
        decay_end = (decay or length) * batch
        return LrBounds(
            total=length * batch,
            decay=decay_end,
            warmup=warmup * batch if self.lr_warmup_fraction is None else self.lr_warmup_fraction * decay_end,
            wsd_decay=None if wsd_decay is None else wsd_decay * batch,
        )
