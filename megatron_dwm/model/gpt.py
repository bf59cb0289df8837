"""The model chunks of this rank, their data-parallel wrapping, and the hooks of the pipeline schedule."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.optimizer import OptimizerConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.training import TrainingConfig
from megatron_dwm.model.kernels import resolve_transformer_impl
from megatron_dwm.model.protocols import ModelChunk, Optimizer
from megatron_dwm.model.recomputation import return_bias_copies
from megatron_dwm.model.torch_layers import torch_block_spec
from megatron_dwm.model.vocabulary import Vocabulary, mask_vocabulary_padding
from megatron_dwm.runtime.device import current_device
from megatron_dwm.runtime.logging import EVERY_RANK

logger = logging.getLogger(__name__)


def build_model_chunks(
    config: TransformerConfig, model: ModelConfig, *, vocabulary: Vocabulary, fp16_lm_cross_entropy: bool = False
) -> list[GPTModel]:
    """Build this rank's chunks of the model, one for each of its virtual pipeline stages, on its device.

    Args:
        config: the result of :func:`~megatron_dwm.model.transformer_config.transformer_config`.
        fp16_lm_cross_entropy: compute the loss in fp16.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    device = current_device()
    stages = [None] if (count := config.virtual_pipeline_model_parallel_size) is None else list(range(count))
    chunks = []
    for stage in stages:
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=_layer_spec(config, model, resolve_transformer_impl(model, device), stage),
            vocab_size=vocabulary.rows,
            max_sequence_length=model.max_position_embeddings or model.seq_length,
            pre_process=is_pp_first_stage(groups.pp) and is_vp_first_stage(stage, count),
            post_process=is_pp_last_stage(groups.pp) and is_vp_last_stage(stage, count),
            fp16_lm_cross_entropy=fp16_lm_cross_entropy,
            parallel_output=True,
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            position_embedding_type=model.positions,
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            seq_len_interpolation_factor=model.rotary_seq_len_interpolation_factor,
            rope_scaling=model.use_rope_scaling,
            rope_scaling_factor=model.rope_scaling_factor,
            vp_stage=stage,
            pg_collection=groups,
        )
        for name, param in chunk.named_parameters():
            if name.endswith("softmax_offset"):  # each rank has only those of its heads
                param.tensor_model_parallel = True
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(param)
        return_bias_copies(chunk)
        if chunk.post_process:
            mask_vocabulary_padding(chunk.output_layer, vocabulary.softmax_size, groups.tp.rank(), groups.tp.size())
        chunks.append(chunk.to(device))
    if groups.dp.rank() == groups.cp.rank() == 0:
        logger.info(
            " > number of parameters on (tensor, pipeline) model parallel rank "
            f"({groups.tp.rank()}, {groups.pp.rank()}): {_num_parameters(chunks)}",
            extra=EVERY_RANK,
        )
    return chunks


def wrap_with_ddp(
    chunks: Sequence[GPTModel],
    config: TransformerConfig,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    training: TrainingConfig,
) -> list[ModelChunk]:
    """Return the chunks in their training precision, with gradient buffers and data-parallel communication."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=optimizer.has_fp32_grads,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=_should_align_param_gather(config, parallel),
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=training.should_check_for_nan(optimizer),
        bucket_size=_num_parameters(chunks) // parallel.ddp_num_buckets
        if parallel.ddp_num_buckets
        else parallel.ddp_bucket_size,
        fp8_param_gather=parallel.fp8_param_gather,
        num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
        average_in_collective=parallel.ddp_average_in_collective,
    )
    half = config.fp16 or config.bf16
    return [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp_config,
            module=Float16Module(config, chunk) if half else chunk,
            # The communication of later chunks overlaps with the first one's compute, without buckets too.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]


def bind_schedule_hooks(
    config: TransformerConfig,
    chunks: Sequence[ModelChunk],
    optimizer: Optimizer,
    parallel: ParallelConfig,
) -> None:
    """Set the hooks in ``config`` by which megatron-core's schedules scale the loss and communicate."""
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in chunks])
        if parallel.align_grad_reduce:
            config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in chunks])
    if parallel.overlap_param_gather and _should_align_param_gather(config, parallel):
        config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in chunks])


def _layer_spec(
    config: TransformerConfig, model: ModelConfig, impl: str, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    if impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm, qk_l2_norm=config.qk_l2_norm
        )
    if impl == "local":
        return get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm
        )
    return torch_block_spec(config, model, vp_stage)


def _should_align_param_gather(config: TransformerConfig, parallel: ParallelConfig) -> bool:
    return parallel.align_param_gather and config.virtual_pipeline_model_parallel_size is not None


def _num_parameters(chunks: Sequence[torch.nn.Module]) -> int:
    return sum(param.numel() for chunk in chunks for param in chunk.parameters())


def _one_or_all(hooks: list[Any]) -> Any:
    """Return a list only if there are several chunks, as megatron-core expects."""
    return hooks if len(hooks) > 1 else hooks[0]
