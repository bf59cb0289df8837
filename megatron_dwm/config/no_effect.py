"""Flags of Megatron-LM that are accepted without effect, so that scripts with them run unchanged.

A flag belongs here if the program always behaves as it asks: it has no effect in Megatron-LM either, or only
with another flag that is refused, or a value of it means "as without the flag". Other values are refused by name.
They are read and checked, and are no part of a run's configuration or of a checkpoint's arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_dwm.config.flags import declared_flags, flag, require_at_least
from megatron_dwm.errors import UserError

OTHER_FIELDS_WITHOUT_EFFECT = frozenset(
    {"create_attention_mask_in_dataloader", "deprecated_use_mcore_models", "legacy_tokenizer", "use_flash_attn"}
)
"""Fields of a run's configuration, and so of its checkpoints' arguments, that have no effect either."""

_NEUTRAL_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "pipeline_model_parallel_comm_backend": ((None, "nccl"), "pipelines communicate by NCCL; leave it out"),
    "ckpt_fully_parallel_load_exchange_algo": (("broadcast",), "shards are broadcast; leave it out"),
    "dist_ckpt_workers": ((1,), "each rank writes with one worker; leave it out"),
    "null_tokenizer_pad_id": ((-1,), "a NullTokenizer pads with -1; leave it out"),
    "cpu_offloading_num_layers": ((0,), "memory is saved only by recomputation; use --recompute-granularity"),
    "main_grads_dtype": (("fp32",), "main gradients are fp32; leave it out"),
    "main_params_dtype": (("fp32",), "main parameters are fp32; leave it out"),
    "exp_avg_dtype": (("fp32",), "the optimizer's state is fp32; leave it out"),
    "exp_avg_sq_dtype": (("fp32",), "the optimizer's state is fp32; leave it out"),
    "rope_type": ((None, "rope"), "only multi-latent attention has another; leave it out"),
    "data_impl": (("infer", "mmap"), "datasets are memory-mapped; leave it out"),
    "cuda_graph_impl": (("none",), "the passes of an outer update do not fit into a captured step; leave it out"),
    "mtp_num_layers": ((None, 0), "the model predicts only the next token, and only these losses are weighted; use 0"),
}
"""Fields of which only some values have no effect: these values, and why the others are refused."""


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
    onnx_safe: str | None = flag(None, "Only for Megatron-LM's older models.")
    openai_gelu: bool = flag(False, "Only for Megatron-LM's older models.")
    apply_residual_connection_post_layernorm: bool = flag(False, "Only for Megatron-LM's older models.")

    # Spellings of older versions of Megatron-LM for what is the default now, and of forks.
    no_query_key_layer_scaling: bool = flag(
        False, "Attention scores are scaled by 1 / layer number only with --apply-query-key-layer-scaling."
    )
    no_log_learnig_rate_to_tensorboard: bool = flag(False, "TensorBoard has the learning rate in any case.")
    log_batch_size_to_tensorboard: bool = flag(False, "TensorBoard has the batch size in any case.")
    data_impl: Literal["infer", "mmap", "lazy", "cached"] = flag("infer", "Only mmap, which infer finds too.")
    ddp_impl: Literal["local", "torch"] = flag(
        "local", "Gradients are reduced by megatron-core's wrapper in any case.", "--DDP-impl"
    )
    contiguous_buffers_in_local_ddp: bool = flag(True, "Gradients are always in contiguous buffers.")
    use_contiguous_buffers_in_local_ddp: bool = flag(
        False, "Gradients are always in contiguous buffers.", old_names=("--use-contiguous-buffers-in-ddp",)
    )
    mmap_warmup: bool = flag(False, "Datasets are read as they are needed.")
    delay_param_gather: bool = flag(False, "Stages gather at the same time unless --no-align-param-gather is given.")
    overlap_p2p_communication: bool = flag(
        False, "The interleaved schedule overlaps unless --no-overlap-p2p-communication is given."
    )
    local_rank: int = flag(
        0,
        "Given by torch.distributed.launch, which also sets it in the environment.",
        old_names=("--local_rank",),
    )
    use_mpi: bool = flag(False, "mpirun's environment is always read.")

    # What happens in any case.
    manual_gc_eval: bool = flag(
        True, "Evaluations never run the garbage collection.", "--no-manual-gc-eval", "--disable-manual-gc-eval"
    )
    enable_one_logger: bool = flag(True, "one-logger is never used.", "--no-one-logger")
    use_persistent_ckpt_worker: bool = flag(
        False, "With a GPU, one process always writes --async-save's checkpoints; without one, forked processes do."
    )
    auto_detect_ckpt_format: bool = flag(False, "The format of --load is always detected from its files.")
    pipeline_model_parallel_comm_backend: Literal["nccl", "ucc"] | None = flag(
        None, "Only nccl; without a GPU pipelines communicate by gloo."
    )
    main_grads_dtype: Literal["fp32", "bf16"] = flag("fp32", "Only fp32.")
    main_params_dtype: Literal["fp32", "fp16"] = flag("fp32", "Only fp32.")
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = flag("fp32", "Only fp32.")
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = flag("fp32", "Only fp32.")
    cuda_graph_impl: Literal["none", "local", "transformer_engine"] = flag("none", "Only none: no step is captured.")
    mtp_num_layers: int | None = flag(None, "Only 0: the model predicts only the next token.")
    rope_type: Literal["rope", "yarn"] | None = flag(None, "Only rope; yarn here is for multi-latent attention.")

    # Flags of newer versions of Megatron-LM (0.17 to 0.20).
    async_strategy: Literal["nvrx", "mcore"] = flag("nvrx", "megatron-core always writes; the files are the same.")
    async_ckpt_use_cpu_shm: bool = flag(False, "For the writer of --async-strategy nvrx; megatron-core always writes.")
    ckpt_fully_parallel_load_exchange_algo: Literal["broadcast", "gather_rounds", "gather_object"] = flag(
        "broadcast", "Only broadcast."
    )
    ckpt_fully_parallel_save_process_group: Literal["dp", "ep_dp"] = flag("dp", "The same without experts.")
    ckpt_fully_parallel_load_process_group: Literal["dp", "ep_dp"] = flag("dp", "The same without experts.")
    ckpt_fully_parallel_load_per_rank_objects: bool = flag(False, "How objects are read does not change them.")
    dist_ckpt_workers: int = flag(1, "Only 1.")
    save_tokenizer_assets: bool = flag(
        True,
        "Checkpoints never hold the tokenizer's files.",
        "--no-save-tokenizer-assets",
        "--disable-save-tokenizer-assets",
    )
    verify_integrity: bool = flag(False, "Checksums are verified unless --no-checkpoint-checksums is given.")
    null_tokenizer_pad_id: int = flag(-1, "Only -1.")
    pytorch_profiler_collect_shapes: bool = flag(False, "Shapes are always recorded.")
    pytorch_profiler_collect_callstack: bool = flag(False, "Call stacks are always recorded.")
    record_shapes: bool = flag(False, "Shapes are always recorded.")

    # Flags that act only with another flag, which is refused.
    cpu_offloading_retain_pinned_cpu_buffers: bool = flag(False, "Only with --cpu-offloading-num-layers.")
    expert_tensor_parallel_size: int | None = flag(None, "Only for mixtures of experts.")
    use_fused_weighted_squared_relu: bool = flag(False, "Only for mixtures of experts.")
    data_parallel_sharding_strategy: Literal["no_shard", "optim", "optim_grads", "optim_grads_params"] = flag(
        "no_shard", "Only with --use-megatron-fsdp."
    )
    disable_symmetric_registration: bool = flag(False, "Only with --use-nccl-ub.")
    kitchen_attention_backend: Literal["sdpa", "fa"] = flag("sdpa", "Only with --use-kitchen-attention.")
    cpu_offloading_num_layers: int = flag(0, "Only 0: no activations are offloaded.")
    optimizer_offload_fraction: float = flag(1.0, "Only with --optimizer-cpu-offload.")
    use_torch_optimizer_for_cpu_offload: bool = flag(False, "Only with --optimizer-cpu-offload.")
    overlap_cpu_optimizer_d2h_h2d: bool = flag(False, "Only with --optimizer-cpu-offload.")
    pin_cpu_grads: bool = flag(True, "Only with --optimizer-cpu-offload.", "--no-pin-cpu-grads")
    pin_cpu_params: bool = flag(True, "Only with --optimizer-cpu-offload.", "--no-pin-cpu-params")
    fim_rate: float = flag(0.5, "Only with --fim-data.")
    fim_spm_rate: float = flag(0.5, "Only with --fim-data.")
    fim_split_sample: str | None = flag(None, "Only with --fim-data.")
    fim_fragment_rate: float | None = flag(None, "Only with --fim-data.")
    fim_no_prefix: str | None = flag(None, "Only with --fim-data.")
    fim_prefix_token: str = flag("<fim_prefix>", "Only with --fim-data.")
    fim_middle_token: str = flag("<fim_middle>", "Only with --fim-data.")
    fim_suffix_token: str = flag("<fim_suffix>", "Only with --fim-data.")
    fim_pad_token: str = flag("<fim_pad>", "Only with --fim-data.")
    fim_eod_token: str = flag("<|endoftext|>", "Only with --fim-data.")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "expert_tensor_parallel_size")
        for item in declared_flags(type(self)):
            if item.field not in _NEUTRAL_VALUES:
                continue
            neutral, reason = _NEUTRAL_VALUES[item.field]
            value = getattr(self, item.field)
            if value not in neutral:
                raise UserError(f"{item.names[0]} {value} is not supported: {reason}")
