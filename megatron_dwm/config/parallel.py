"""Flags of the parallel layout and its communication."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_dwm.config.flags import flag, require_at_least
from megatron_dwm.errors import UserError

CP_COMM_TYPES = ("p2p", "all_gather", "a2a", "a2a+p2p")


@dataclass(frozen=True)
class ParallelConfig:
    """Parallelism and data-parallel communication."""

    tensor_model_parallel_size: int = flag(1, "Degree of tensor parallelism.")
    pipeline_model_parallel_size: int = flag(1, "Degree of pipeline parallelism.")
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, "Layers in one virtual pipeline stage; enables the interleaved schedule."
    )
    num_virtual_stages_per_pipeline_rank: int | None = flag(
        None, "Virtual pipeline stages on each rank; enables the interleaved schedule."
    )
    microbatch_group_size_per_vp_stage: int | None = flag(
        None,
        "Microbatches that the interleaved schedule runs through one virtual stage before the next. Default: the "
        "pipeline parallel size.",
        "--microbatch-group-size-per-virtual-pipeline-stage",
    )
    decoder_first_pipeline_num_layers: int | None = flag(None, "Layers of the first pipeline rank.")
    decoder_last_pipeline_num_layers: int | None = flag(None, "Layers of the last pipeline rank.")
    account_for_embedding_in_pipeline_split: bool = flag(
        False, "Count the embedding as a layer when layers are divided over the pipeline."
    )
    account_for_loss_in_pipeline_split: bool = flag(
        False, "Count the output layer and the loss as a layer when layers are divided over the pipeline."
    )
    pipeline_model_parallel_layout: str | None = flag(
        None, "Pipeline stages as letters: E embedding, t layer, L loss, | between stages, *N to repeat."
    )
    sequence_parallel: bool = flag(False, "Shard activations along the sequence inside a TP group.")
    context_parallel_size: int = flag(1, "Degree of context parallelism: sequences are split over this many ranks.")
    cp_comm_type: list[str] = flag(
        ["p2p"],
        "How Transformer Engine's attention communicates between context-parallel ranks: p2p, all_gather, a2a or "
        "a2a+p2p. --transformer-impl torch always gathers keys and values.",
    )
    hierarchical_context_parallel_sizes: list[int] | None = flag(
        None, "Sizes of the levels of context parallelism, for --cp-comm-type a2a+p2p."
    )
    expert_model_parallel_size: int = flag(
        1, "Degree of expert parallelism.", refused="only dense GPT models are; leave it out"
    )
    overlap_p2p_comm: bool = flag(
        True,
        "Do not overlap pipeline communication with compute in the interleaved schedule.",
        "--no-overlap-p2p-communication",
    )
    overlap_p2p_comm_warmup_flush: bool = flag(
        False,
        "Overlap pipeline communication with compute in warm-up and flush of the interleaved schedule too.",
        "--overlap-p2p-communication-warmup-flush",
    )
    tp_comm_overlap: bool = flag(
        False,
        "Overlap tensor-parallel communication with matrix products; needs Transformer Engine and --sequence-parallel.",
    )
    tp_comm_bulk_wgrad: bool = flag(
        True,
        "Do not overlap the all-gather with the activation gradient's GEMM under --tp-comm-overlap.",
        "--no-tp-comm-bulk-wgrad",
        "--disable-tp-comm-bulk-wgrad",
    )
    tp_comm_bulk_dgrad: bool = flag(
        True,
        "Do not overlap the reduce-scatter with the weight gradient's GEMM under --tp-comm-overlap.",
        "--no-tp-comm-bulk-dgrad",
        "--disable-tp-comm-bulk-dgrad",
    )
    tp_comm_overlap_ag: bool = flag(
        True,
        "Do not overlap the all-gather with the GEMM that needs its result under --tp-comm-overlap.",
        "--no-tp-comm-overlap-ag",
        "--disable-tp-comm-overlap-ag",
    )
    tp_comm_overlap_rs: bool = flag(
        True,
        "Do not overlap the reduce-scatter with the GEMM before it under --tp-comm-overlap.",
        "--no-tp-comm-overlap-rs",
        "--disable-tp-comm-overlap-rs",
    )
    tp_comm_overlap_rs_dgrad: bool = flag(
        False, "Also overlap the reduce-scatter with the activation gradient's GEMM under --tp-comm-overlap."
    )
    tp_comm_split_ag: bool = flag(
        True,
        "--no-tp-comm-overlap-ag for versions of Transformer Engine before 1.6.",
        "--no-tp-comm-split-ag",
        "--disable-tp-comm-split-ag",
    )
    tp_comm_split_rs: bool = flag(
        True,
        "--no-tp-comm-overlap-rs for versions of Transformer Engine before 1.6.",
        "--no-tp-comm-split-rs",
        "--disable-tp-comm-split-rs",
    )
    tp_comm_overlap_cfg: str | None = flag(
        None, "YAML file of --tp-comm-overlap: how each layer's communication is overlapped."
    )
    tp_comm_bootstrap_backend: Literal["nccl", "mpi", "gloo"] = flag(
        "nccl", "Backend with which ranks exchange the addresses of --tp-comm-overlap's buffers."
    )
    use_distributed_optimizer: bool = flag(False, "Shard the optimizer's state over data-parallel ranks.")
    num_distributed_optimizer_instances: int = flag(
        1, "Number of copies of the distributed optimizer's state; each is sharded over a part of the replicas."
    )
    overlap_grad_reduce: bool = flag(False, "Overlap gradient reduction with the backward pass.")
    overlap_param_gather: bool = flag(False, "Overlap parameter all-gather with the forward pass.")
    align_grad_reduce: bool = flag(
        True,
        "Do not align gradient reduction over stages.",
        "--no-align-grad-reduce",
        "--disable-align-grad-reduce",
        old_names=("--no-delay-grad-reduce",),
    )
    align_param_gather: bool = flag(True, "Do not align parameter gather over stages.", "--no-align-param-gather")
    ddp_num_buckets: int | None = flag(None, "Number of gradient buckets.")
    ddp_bucket_size: int | None = flag(None, "Parameters in one gradient bucket.")
    ddp_average_in_collective: bool = flag(False, "Average gradients in the collective itself.")
    fp8_param_gather: bool = flag(
        False, "Keep and gather parameters in FP8; needs the distributed optimizer and --fp8-format."
    )
    defer_embedding_wgrad_compute: bool = flag(
        False, "Compute the output layer's weight gradient while the pipeline is flushed."
    )
    wgrad_deferral_limit: int = flag(
        0, "Maximum number of microbatches that --defer-embedding-wgrad-compute defers; 0 for all."
    )
    clone_scatter_output_in_embedding: bool = flag(
        True,
        "Do not copy the embedding's output under sequence parallelism; saves the copy, but uses more memory.",
        "--no-clone-scatter-output-in-embedding",
        "--disable-clone-scatter-output-in-embedding",
    )
    distributed_backend: Literal["nccl", "gloo"] = flag(
        "nccl", "Communication backend; without a GPU it is always gloo."
    )
    distributed_timeout_minutes: int = flag(
        10, "Timeout of collectives, and of waiting for ranks that do not join or do not answer during start-up."
    )
    use_tp_pp_dp_mapping: bool = flag(False, "Order ranks tp-pp-dp instead of tp-dp-pp.")
    enable_gloo_process_groups: bool = flag(
        True, "Do not create gloo groups in addition to NCCL's.", "--disable-gloo-process-groups"
    )

    def __post_init__(self) -> None:
        require_at_least(
            self,
            1,
            "tensor_model_parallel_size pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage "
            "num_virtual_stages_per_pipeline_rank microbatch_group_size_per_vp_stage decoder_first_pipeline_num_layers "
            "decoder_last_pipeline_num_layers context_parallel_size ddp_num_buckets ddp_bucket_size "
            "distributed_timeout_minutes num_distributed_optimizer_instances",
        )
        self._check_context_parallelism()
        interleaved = self.num_layers_per_virtual_pipeline_stage, self.num_virtual_stages_per_pipeline_rank
        if None not in interleaved:
            raise UserError(
                "--num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank set the same; "
                "give one"
            )
        self._check_split()
        if self.num_distributed_optimizer_instances > 1 and not self.use_distributed_optimizer:
            raise UserError(
                f"--num-distributed-optimizer-instances {self.num_distributed_optimizer_instances} has no effect "
                "without --use-distributed-optimizer; add it"
            )
        if self.fp8_param_gather and not self.use_distributed_optimizer:
            raise UserError("--fp8-param-gather needs --use-distributed-optimizer; add it")
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise UserError(
                "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce; add them"
            )
        if self.ddp_num_buckets is not None and self.ddp_bucket_size is not None:
            raise UserError("--ddp-num-buckets and --ddp-bucket-size exclude each other; give one")

    def _check_split(self) -> None:
        """Refuse contradictory ways of splitting the layers over the pipeline."""
        are_ends_counted = self.account_for_embedding_in_pipeline_split or self.account_for_loss_in_pipeline_split
        ends = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        has_ends = ends != (None, None)
        if has_ends and are_ends_counted:
            raise UserError(
                "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers exclude --account-for-*; "
                "give one of them"
            )
        if has_ends and self.num_layers_per_virtual_pipeline_stage is not None:
            raise UserError(
                "--num-layers-per-virtual-pipeline-stage with --decoder-first-pipeline-num-layers or "
                "--decoder-last-pipeline-num-layers: stages differ; give --num-virtual-stages-per-pipeline-rank"
            )
        if self.pipeline_model_parallel_layout is not None:
            virtual = self.num_layers_per_virtual_pipeline_stage, self.num_virtual_stages_per_pipeline_rank
            if has_ends or are_ends_counted or virtual != (None, None):
                raise UserError(
                    "--pipeline-model-parallel-layout defines all stages; leave out the other flags that define them"
                )
        if self.overlap_p2p_comm_warmup_flush and not self.overlap_p2p_comm:
            raise UserError(
                "--overlap-p2p-communication-warmup-flush excludes --no-overlap-p2p-communication; leave one out"
            )

    def _check_context_parallelism(self) -> None:
        for kind in self.cp_comm_type:
            if kind not in CP_COMM_TYPES:
                raise UserError(f"--cp-comm-type {kind}: unknown; choose from {', '.join(CP_COMM_TYPES)}")
        if len(set(self.cp_comm_type)) > 1:
            raise UserError(
                f"--cp-comm-type {' '.join(self.cp_comm_type)}: megatron-core 0.16 uses the values of the wrong "
                "layers; give one for all layers"
            )
        sizes = self.hierarchical_context_parallel_sizes
        if sizes is not None and math.prod(sizes) != self.cp:
            raise UserError(
                f"--hierarchical-context-parallel-sizes {' '.join(map(str, sizes))} do not make "
                f"--context-parallel-size {self.cp}; change one"
            )
        if "a2a+p2p" in self.cp_comm_type and (sizes is None or len(sizes) != 2):
            raise UserError(
                "--cp-comm-type a2a+p2p needs two --hierarchical-context-parallel-sizes, of a2a and of p2p; give them"
            )

    @property
    def tp(self) -> int:
        """The tensor parallel size."""
        return self.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        """The pipeline parallel size."""
        return self.pipeline_model_parallel_size

    @property
    def mp(self) -> int:
        """The model parallel size: the number of ranks that hold the parameters once."""
        return self.tp * self.pp

    @property
    def cp(self) -> int:
        """The context parallel size."""
        return self.context_parallel_size

    @property
    def context_parallel_heads(self) -> int:
        """The context-parallel ranks that the attention heads are split over (``--cp-comm-type`` with a2a)."""
        sizes = self.hierarchical_context_parallel_sizes
        of_kind = {"a2a": self.cp, "a2a+p2p": sizes[0] if sizes else 1}
        return of_kind.get(self.cp_comm_type[0], 1)

    def virtual_stages(self, num_layers: int) -> int | None:
        """Return the number of model chunks on each pipeline rank; None without the interleaved schedule.

        Raises:
            UserError: the number of layers is not divisible.
        """
        if self.pipeline_model_parallel_layout is not None:
            return self._stages_of_layout(num_layers)
        counted = num_layers + self.account_for_embedding_in_pipeline_split + self.account_for_loss_in_pipeline_split
        chunks = self.num_virtual_stages_per_pipeline_rank
        if self.num_layers_per_virtual_pipeline_stage is not None:
            if counted % (self.pp * self.num_layers_per_virtual_pipeline_stage):
                raise UserError(
                    f"--num-layers {num_layers} is not divisible by --pipeline-model-parallel-size {self.pp} x "
                    f"--num-layers-per-virtual-pipeline-stage {self.num_layers_per_virtual_pipeline_stage}; "
                    "change one"
                )
            chunks = counted // self.pp // self.num_layers_per_virtual_pipeline_stage
        if chunks is not None and chunks > 1 and self.pp < 2:
            raise UserError(
                f"{chunks} virtual pipeline stages need --pipeline-model-parallel-size 2 or more, not 1; change one"
            )
        ends = [
            size
            for size in (self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers)
            if size is not None
        ]
        middle, ranks = counted - sum(ends), self.pp - len(ends)
        parts = [*ends, middle // ranks] if ranks > 0 else ends
        is_divisible = middle % ranks == 0 if ranks > 0 else middle == 0
        if not is_divisible or any(size < 1 or size % (chunks or 1) for size in parts):
            raise UserError(
                f"--num-layers {num_layers} is not divisible by --pipeline-model-parallel-size {self.pp}"
                + (f" x {chunks} virtual stages" if chunks else "")
                + (" as the flags divide it" if ends or counted != num_layers else "")
                + "; change one"
            )
        return chunks if chunks and chunks > 1 else None

    def _stages_of_layout(self, num_layers: int) -> int | None:
        """Return the number of model chunks on each pipeline rank, from the layout.

        Raises:
            UserError: the layout does not fit the layers and the pipeline.
        """
        # Imported here: megatron-core takes seconds, and most runs have no layout.
        from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

        layout = str(self.pipeline_model_parallel_layout)
        try:
            parsed = PipelineParallelLayerLayout.from_str(layout, self.pp)
            parsed.validate_layer_layout(num_layers=num_layers, mtp_num_layers=0)
        except (AssertionError, AttributeError, LookupError, SyntaxError, TypeError, ValueError) as error:
            raise UserError(
                f"--pipeline-model-parallel-layout {layout}: it does not place {num_layers} layers on {self.pp} "
                f"pipeline ranks ({error}); change it"
            ) from None
        chunks = parsed.virtual_pipeline_model_parallel_size
        return chunks if chunks > 1 else None
