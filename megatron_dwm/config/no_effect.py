"""Megatron-LM's flags that change nothing here, so that scripts that give them run as they are.

A flag belongs here if what it asks for is what happens in any case: it has no effect in Megatron-LM either, or only
with another flag that is refused, or a value of it means "as without the flag". Other values are refused by name.
They are read and checked, and are no part of a run's configuration or of a checkpoint's arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_dwm.config.flags import declared_flags, flag, require_at_least
from megatron_dwm.errors import UserError

OTHER_FIELDS_WITHOUT_EFFECT = frozenset(
    {"create_attention_mask_in_dataloader", "deprecated_use_mcore_models", "use_flash_attn"}
)
"""Fields of a run's configuration, and so of its checkpoints' arguments, that change nothing either."""

_NEUTRAL_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "rerun_mode": (("validate_results", "disabled"), "an iteration is never run again; give disabled"),
    "error_injection_rate": ((0,), "an iteration is never run again, so no error is injected; leave it out"),
    "timing_log_level": ((0,), "there are no timers; leave it out"),
    "timing_log_option": (("minmax",), "there are no timers; leave it out"),
    "wandb_project": ((None, ""), "records go to the log, a JSON-lines file and TensorBoard; leave it out"),
    "dist_ckpt_strictness": (("assume_ok_unexpected",), "checkpoints are loaded by the default rule; leave it out"),
    "num_distributed_optimizer_instances": ((1,), "the optimizer is sharded over all replicas; leave it out"),
    "pipeline_model_parallel_comm_backend": ((None, "nccl"), "pipelines communicate by NCCL; leave it out"),
    "cpu_offloading_num_layers": ((0,), "memory is saved by recomputation alone; use --recompute-granularity"),
    "main_grads_dtype": (("fp32",), "main gradients are fp32; leave it out"),
    "main_params_dtype": (("fp32",), "main parameters are fp32; leave it out"),
    "exp_avg_dtype": (("fp32",), "the optimizer's state is fp32; leave it out"),
    "exp_avg_sq_dtype": (("fp32",), "the optimizer's state is fp32; leave it out"),
    "softmax_type": (("vanilla",), "attention has the usual softmax; leave it out"),
    "rope_type": ((None, "rope"), "only multi-latent attention has another; leave it out"),
}
"""Fields that not every value leaves without effect: the values that do, and why the others are refused."""


@dataclass(frozen=True)
class NoEffectConfig:
    """Accepted without effect."""

    # Spellings that Megatron-LM still accepts and no longer uses for GPTs of megatron-core.
    use_dist_ckpt_deprecated: bool = flag(
        False, "Not used in Megatron-LM either; the format is --ckpt-format's.", "--use-dist-ckpt"
    )
    dist_ckpt_format_deprecated: str | None = flag(
        None, "Not used in Megatron-LM either; the format is --ckpt-format's.", "--dist-ckpt-format"
    )
    ckpt_fully_parallel_save_deprecated: bool = flag(
        False,
        "All data-parallel ranks write unless --no-ckpt-fully-parallel-save is given.",
        "--ckpt-fully-parallel-save",
    )
    async_tensor_model_parallel_allreduce: bool = flag(
        True,
        "Not used in Megatron-LM either.",
        "--no-async-tensor-model-parallel-allreduce",
        "--disable-async-tensor-model-parallel-allreduce",
    )
    scatter_gather_tensors_in_pipeline: bool = flag(
        True, "Not used in Megatron-LM either.", "--no-scatter-gather-tensors-in-pipeline"
    )
    onnx_safe: str | None = flag(None, "For Megatron-LM's older models alone.")

    # What happens in any case.
    manual_gc_eval: bool = flag(
        True, "Evaluations do not collect garbage in any case.", "--no-manual-gc-eval", "--disable-manual-gc-eval"
    )
    enable_one_logger: bool = flag(True, "There is no one-logger in any case.", "--no-one-logger")
    rerun_mode: Literal["disabled", "validate_results", "report_stats"] = flag(
        "validate_results",
        "A NaN ends the run at once, as with disabled; Megatron-LM's default runs the iteration again before it ends.",
    )
    timing_log_level: Literal[0, 1, 2] = flag(0, "Only 0: there are no timers inside an iteration.")
    timing_log_option: Literal["max", "minmax", "all"] = flag("minmax", "Only minmax: there are no timers.")
    dist_ckpt_strictness: Literal[
        "assume_ok_unexpected",
        "log_unexpected",
        "log_all",
        "raise_unexpected",
        "raise_all",
        "return_unexpected",
        "return_all",
        "ignore_all",
    ] = flag("assume_ok_unexpected", "Only assume_ok_unexpected, which is how checkpoints are loaded.")
    num_distributed_optimizer_instances: int = flag(1, "Only 1: the optimizer is sharded over all replicas.")
    pipeline_model_parallel_comm_backend: Literal["nccl", "ucc"] | None = flag(
        None, "Only nccl; without a GPU pipelines communicate by gloo."
    )
    main_grads_dtype: Literal["fp32", "bf16"] = flag("fp32", "Only fp32.")
    main_params_dtype: Literal["fp32", "fp16"] = flag("fp32", "Only fp32.")
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = flag("fp32", "Only fp32.")
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = flag("fp32", "Only fp32.")
    softmax_type: Literal["vanilla", "off-by-one", "learnable"] = flag("vanilla", "Only vanilla.")
    rope_type: Literal["rope", "yarn"] | None = flag(None, "Only rope: the other is of multi-latent attention.")

    # What acts only with another flag, which is refused.
    expert_tensor_parallel_size: int | None = flag(None, "For mixtures of experts alone.")
    error_injection_rate: int = flag(0, "Only 0: no errors are injected.")
    error_injection_type: Literal["correct_result", "transient_error", "persistent_error"] = flag(
        "transient_error", "For --error-injection-rate alone."
    )
    profile_step_start: int = flag(10, "For --profile alone.")
    profile_step_end: int = flag(12, "For --profile alone.")
    profile_ranks: list[int] = flag([0], "For --profile alone.")
    use_pytorch_profiler: bool = flag(False, "For --profile alone.")
    memory_snapshot_path: str = flag("snapshot.pickle", "For --record-memory-history alone.")
    barrier_with_L1_time: bool = flag(  # noqa: N815 - named as in Megatron-LM
        True, "For --timing-log-level 1 and 2 alone.", "--no-barrier-with-level-1-timing"
    )
    straggler_ctrlr_port: int = flag(65535, "For --log-straggler alone.")
    straggler_minmax_count: int = flag(1, "For --log-straggler alone.")
    disable_straggler_on_startup: bool = flag(False, "For --log-straggler alone.")
    wandb_project: str | None = flag(None, "Only an empty one, which means none.")
    wandb_entity: str | None = flag(None, "For --wandb-project alone.")
    wandb_exp_name: str | None = flag(None, "For --wandb-project alone.")
    wandb_save_dir: str | None = flag(None, "For --wandb-project alone.")
    data_parallel_sharding_strategy: Literal["no_shard", "optim", "optim_grads", "optim_grads_params"] = flag(
        "no_shard", "For --use-megatron-fsdp alone."
    )
    disable_symmetric_registration: bool = flag(False, "For --use-nccl-ub alone.")
    microbatch_group_size_per_vp_stage: int | None = flag(
        None,
        "For the interleaved schedule alone, where only the pipeline's size, which is the default, is accepted.",
        "--microbatch-group-size-per-virtual-pipeline-stage",
    )
    wgrad_deferral_limit: int = flag(0, "For --defer-embedding-wgrad-compute alone.")
    kitchen_attention_backend: Literal["sdpa", "fa"] = flag("sdpa", "For --use-kitchen-attention alone.")
    cpu_offloading_num_layers: int = flag(0, "Only 0: no activations are offloaded.")
    optimizer_offload_fraction: float = flag(1.0, "For --optimizer-cpu-offload alone.")
    use_torch_optimizer_for_cpu_offload: bool = flag(False, "For --optimizer-cpu-offload alone.")
    overlap_cpu_optimizer_d2h_h2d: bool = flag(False, "For --optimizer-cpu-offload alone.")
    pin_cpu_grads: bool = flag(True, "For --optimizer-cpu-offload alone.", "--no-pin-cpu-grads")
    pin_cpu_params: bool = flag(True, "For --optimizer-cpu-offload alone.", "--no-pin-cpu-params")
    tp_comm_bulk_wgrad: bool = flag(
        True, "For --tp-comm-overlap alone.", "--no-tp-comm-bulk-wgrad", "--disable-tp-comm-bulk-wgrad"
    )
    tp_comm_bulk_dgrad: bool = flag(
        True, "For --tp-comm-overlap alone.", "--no-tp-comm-bulk-dgrad", "--disable-tp-comm-bulk-dgrad"
    )
    tp_comm_overlap_ag: bool = flag(
        True, "For --tp-comm-overlap alone.", "--no-tp-comm-overlap-ag", "--disable-tp-comm-overlap-ag"
    )
    tp_comm_overlap_rs: bool = flag(
        True, "For --tp-comm-overlap alone.", "--no-tp-comm-overlap-rs", "--disable-tp-comm-overlap-rs"
    )
    tp_comm_overlap_rs_dgrad: bool = flag(False, "For --tp-comm-overlap alone.")
    tp_comm_split_ag: bool = flag(
        True, "For --tp-comm-overlap alone.", "--no-tp-comm-split-ag", "--disable-tp-comm-split-ag"
    )
    tp_comm_split_rs: bool = flag(
        True, "For --tp-comm-overlap alone.", "--no-tp-comm-split-rs", "--disable-tp-comm-split-rs"
    )
    tp_comm_overlap_cfg: str | None = flag(None, "For --tp-comm-overlap alone.")
    tp_comm_bootstrap_backend: Literal["nccl", "mpi", "gloo"] = flag("nccl", "For --tp-comm-overlap alone.")
    fim_rate: float = flag(0.5, "For --fim-data alone.")
    fim_spm_rate: float = flag(0.5, "For --fim-data alone.")
    fim_split_sample: str | None = flag(None, "For --fim-data alone.")
    fim_fragment_rate: float | None = flag(None, "For --fim-data alone.")
    fim_no_prefix: str | None = flag(None, "For --fim-data alone.")
    fim_prefix_token: str = flag("<fim_prefix>", "For --fim-data alone.")
    fim_middle_token: str = flag("<fim_middle>", "For --fim-data alone.")
    fim_suffix_token: str = flag("<fim_suffix>", "For --fim-data alone.")
    fim_pad_token: str = flag("<fim_pad>", "For --fim-data alone.")
    fim_eod_token: str = flag("<|endoftext|>", "For --fim-data alone.")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "expert_tensor_parallel_size microbatch_group_size_per_vp_stage")
        for item in declared_flags(type(self)):
            if item.field not in _NEUTRAL_VALUES:
                continue
            neutral, reason = _NEUTRAL_VALUES[item.field]
            value = getattr(self, item.field)
            if value not in neutral:
                raise UserError(f"{item.names[0]} {value} is not supported: {reason}")

    def check_microbatch_group(self, pipeline_size: int | None) -> None:
        """Refuse another order of the interleaved schedule than megatron-core's default.

        Args:
            pipeline_size: number of pipeline ranks; None if the schedule is not interleaved.

        Raises:
            UserError: it is asked for.
        """
        group = self.microbatch_group_size_per_vp_stage
        if pipeline_size is not None and group not in (None, pipeline_size):
            raise UserError(
                f"--microbatch-group-size-per-virtual-pipeline-stage {group} is not supported: the interleaved "
                f"schedule takes as many microbatches as there are stages; give {pipeline_size} or leave it out"
            )
