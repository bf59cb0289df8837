"""From the flags to megatron-core's TransformerConfig, the same one that Megatron-LM makes of them."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.optimizer import OptimizerConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.training import TrainingConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.kernels import available_kernels, resolve_transformer_impl, without_fusions
from megatron_dwm.model.tp_comm_overlap import check_tp_comm_overlap
from megatron_dwm.model.transformer_checks import (
    check_architecture,
    check_attention_mask,
    check_attention_variables,
    check_determinism,
    check_fp8,
    check_layers,
    check_recomputation,
    check_recomputed_units,
)

logger = logging.getLogger(__name__)

_YARN = {
    "yarn_rotary_scaling_factor": "rotary_scaling_factor",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
    **{
        name: name
        for name in (
            "yarn_original_max_position_embeddings",
            "yarn_beta_fast",
            "yarn_beta_slow",
            "yarn_correction_range_round_to_int",
        )
    },
}
"""Attributes of megatron-core's configuration that YaRN reads, and the fields of ModelConfig."""


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    device: torch.device,
    *,
    has_attention_mask: bool = False,
) -> TransformerConfig:
    """Return the configuration of the language model's layers, schedule and kernels.

    Flags that a TransformerConfig has under the same name are copied; the rest follows Megatron-LM's rules.
    Fused kernels are used if the flags request them and this machine has them.

    Args:
        has_attention_mask: whether batches have an explicit attention mask (``--reset-attention-mask``).

    Raises:
        UserError: flags that contradict each other, or that need something this machine lacks.
    """
    impl = resolve_transformer_impl(model, device)
    check_architecture(model, parallel, training, optimizer)
    check_layers(model, parallel, impl)
    check_attention_variables(model.attention_backend, impl, os.environ)
    check_tp_comm_overlap(parallel, impl)
    if has_attention_mask:
        check_attention_mask(model, impl, device)
    check_recomputation(model, parallel)
    if device.type == "cuda":
        if training.deterministic_mode:
            check_determinism(impl, os.environ)
        if model.fp8 is not None:
            check_fp8(model, torch.cuda.get_device_capability(device))
    values = same_named(TransformerConfig, model, parallel, training, optimizer)
    values.update(_architecture(model))
    values.update(_layout(model, parallel, device))
    values.update(_precision(optimizer))
    values.update(
        recompute_granularity=model.recomputation,
        inference_sampling_seed=training.seed,
        transformer_impl="transformer_engine" if impl == "transformer_engine" else "local",
        persist_layer_norm=not model.no_persist_layer_norm,
        cuda_graph_scope=[],  # megatron-core warns about its own default
    )
    if device.type == "cpu":
        if model.cross_entropy_loss_fusion:
            logger.warning(
                "--cross-entropy-loss-fusion: a CPU has no fused kernel; the plain cross entropy is used, which does "
                "not round the gradients of the logits to bf16"
            )
        values.update(without_fusions(values))
    else:
        values.update(available_kernels(values, impl))
    try:
        config = TransformerConfig(**values)
    except (ValueError, AssertionError) as error:  # megatron-core's checks; those above name flags and remedies
        raise UserError(f"megatron-core cannot combine the model's flags: {error}; change them") from error
    if model.positions == "yarn":
        # megatron-core reads these attributes of its configuration, but does not declare them.
        for name, field in _YARN.items():
            setattr(config, name, getattr(model, field))
    check_recomputed_units(config)
    return config


def has_tanh_gelu(model: ModelConfig) -> bool:
    """Return whether GELU is its tanh approximation, as Megatron-LM's is when it is fused with the bias."""
    return model.bias_gelu_fusion and model.add_bias_linear


def same_named(core_class: type, *configs: Any) -> dict[str, Any]:
    """Return the flags that one of megatron-core's configuration classes has under the same name."""
    names = {field.name for field in dataclasses.fields(core_class)}
    return {
        field.name: getattr(config, field.name)
        for config in configs
        for field in dataclasses.fields(config)
        if field.name in names
    }


def _architecture(model: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "ffn_hidden_size": model.ffn,
        "kv_channels": model.head_size,
        "num_query_groups": model.num_query_groups if model.group_query_attention else None,
        "add_qkv_bias": model.add_qkv_bias or model.add_bias_linear,
        "attention_softmax_in_fp32": model.attention_softmax_in_fp32 or model.apply_query_key_layer_scaling,
        "attention_backend": AttnBackend[model.attention_backend],
        "window_size": model.window,
        "window_attn_skip_freq": model.layers_of("window_attn_skip_freq"),
        "no_rope_freq": model.layers_of("no_rope_freq"),
        "apply_rope_fusion": model.apply_rope_fusion and model.positions == "rope",
        "bias_activation_fusion": model.bias_gelu_fusion and model.add_bias_linear,
    }
    if model.swiglu:
        values.update(activation_func=F.silu, gated_linear_unit=True, bias_activation_fusion=model.bias_swiglu_fusion)
    elif model.quick_geglu:  # megatron-core fuses it only in mixtures of experts
        values.update(activation_func=quick_gelu, gated_linear_unit=True, bias_activation_fusion=False)
    elif model.squared_relu:
        values.update(activation_func=squared_relu)
    else:
        values.update(activation_func=F.gelu)
    if model.glu_linear_offset != 0 or model.activation_func_clamp_value is not None:
        values.update(bias_activation_fusion=False)  # the fused SwiGLU supports neither
    if model.early_recompute_method is not None:
        values.update(
            recompute_method=model.recompute_method or model.early_recompute_method,
            recompute_num_layers=model.recompute_num_layers or 1,
        )
    if model.init_method_xavier_uniform:
        xavier = torch.nn.init.xavier_uniform_
        values.update(init_method=xavier, output_layer_init_method=xavier)
    return values


def _layout(model: ModelConfig, parallel: ParallelConfig, device: torch.device) -> dict[str, Any]:
    virtual_stages = parallel.virtual_stages(model.num_layers)
    overlap = parallel.overlap_p2p_comm and virtual_stages is not None
    return {
        "sequence_parallel": parallel.sequence_parallel and parallel.tp > 1,
        "virtual_pipeline_model_parallel_size": virtual_stages,
        "num_layers_in_first_pipeline_stage": parallel.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": parallel.decoder_last_pipeline_num_layers,
        "overlap_p2p_comm": overlap,
        # Gloo would pair its messages wrongly, and a CPU has nothing to overlap them with.
        "overlap_p2p_comm_warmup_flush": overlap and parallel.overlap_p2p_comm_warmup_flush and device.type == "cuda",
        "batch_p2p_comm": not overlap,
        # Gloo reads an output while it is being sent; if it were freed, overwritten memory would be sent.
        "deallocate_pipeline_outputs": device.type == "cuda",
        "cp_comm_type": parallel.cp_comm_type[0],
        "fp8_param": parallel.fp8_param_gather,
    }


def _precision(optimizer: OptimizerConfig) -> dict[str, Any]:
    return {"params_dtype": optimizer.params_dtype, "pipeline_dtype": optimizer.params_dtype}
