"""The flags become the TransformerConfig that Megatron-LM makes of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dwm.config.flags import declared_flags
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.transformer_config import has_tanh_gelu, same_named
from tests.unit.model.configs import GPU, SIZES, build_config


def test_flags_of_the_same_name_are_copied():
    config = build_config(
        training={"use_cpu_initialization": True, "perform_initialization": False, "seed": 5},
        hidden_dropout=0.3,
        layernorm_epsilon=1e-6,
        init_method_std=0.01,
        embedding_init_method_std=1.0,
        qk_layernorm=True,
        calculate_per_token_loss=True,
    )
    assert not config.perform_initialization
    assert (config.num_layers, config.hidden_size, config.hidden_dropout) == (4, 64, 0.3)
    assert (config.layernorm_epsilon, config.init_method_std, config.embedding_init_method_std) == (
        1e-6,
        0.01,
        1.0,
    )
    assert config.qk_layernorm and config.calculate_per_token_loss and config.use_cpu_initialization
    assert config.attention_backend is AttnBackend.auto
    assert config.inference_sampling_seed == 5


def test_flags_of_pipelines_and_checks_are_copied():
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2,
        decoder_first_pipeline_num_layers=1,
        clone_scatter_output_in_embedding=False,
    )
    config = build_config(parallel=parallel, training={"test_mode": True})
    assert (config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage) == (1, None)
    assert config.test_mode and not config.clone_scatter_output_in_embedding
    interleaved = ParallelConfig(
        pipeline_model_parallel_size=2,
        num_virtual_stages_per_pipeline_rank=2,
        microbatch_group_size_per_vp_stage=3,
        overlap_p2p_comm_warmup_flush=True,
    )
    assert build_config(parallel=interleaved).microbatch_group_size_per_vp_stage == 3
    on_gpu = build_config(GPU, parallel=interleaved, transformer_impl="torch")
    assert on_gpu.overlap_p2p_comm_warmup_flush


def test_flags_of_fp8_are_copied():
    changed: dict[str, Any] = {
        **{"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_margin": 1, "fp8_interval": 2, "fp8_wgrad": False},
        **{"fp8_amax_history_len": 3, "fp8_amax_compute_algo": "max", "first_last_layers_bf16": True},
        **{"num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 2},
    }
    copied, unchanged = (same_named(TransformerConfig, ModelConfig(**SIZES, **flags)) for flags in (changed, {}))
    assert {name: copied[name] for name in changed} == changed
    assert not any(unchanged[name] == value for name, value in changed.items())


def test_flags_of_overlapped_and_deferred_communication_are_copied():
    changed: dict[str, Any] = {
        **dict.fromkeys(
            ("tp_comm_bulk_wgrad", "tp_comm_bulk_dgrad", "tp_comm_overlap_ag", "tp_comm_overlap_rs"), False
        ),
        **dict.fromkeys(("tp_comm_split_ag", "tp_comm_split_rs"), False),
        "tp_comm_overlap_rs_dgrad": True,
        "tp_comm_bootstrap_backend": "gloo",
        "wgrad_deferral_limit": 3,
        "account_for_embedding_in_pipeline_split": True,
    }
    config = build_config(parallel=ParallelConfig(**changed))
    assert {name: getattr(config, name) for name in changed} == changed
    unchanged = build_config()
    assert not any(getattr(unchanged, name) == value for name, value in changed.items())
    last = ParallelConfig(pipeline_model_parallel_size=2, decoder_last_pipeline_num_layers=1)
    assert build_config(parallel=last).num_layers_in_last_pipeline_stage == 1
    deferred = ParallelConfig(pipeline_model_parallel_size=2, defer_embedding_wgrad_compute=True)
    with pytest.raises(UserError, match="Cannot defer embedding wgrad compute when gradient accumulation fusion"):
        build_config(parallel=deferred)  # the fusion needs a GPU


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"checkpoint_activations": True}, ("full", "uniform", 1)),
        ({"activations_checkpoint_method": "block"}, ("full", "block", 1)),
        ({"activations_checkpoint_method": "uniform", "recompute_num_layers": 2}, ("full", "uniform", 2)),
    ],
)
def test_early_spellings_of_recomputation_mean_full_recomputation(
    flags: dict[str, Any], expected: tuple[str, str, int]
):
    config = build_config(**flags)
    assert (config.recompute_granularity, config.recompute_method, config.recompute_num_layers) == expected


def test_sizes_follow_megatrons_rules():
    plain = build_config()
    assert (plain.ffn_hidden_size, plain.kv_channels, plain.num_query_groups) == (256, 16, 4)
    gated = build_config(
        swiglu=True, group_query_attention=True, num_query_groups=2, kv_channels=32, add_bias_linear=False
    )
    assert (gated.ffn_hidden_size, gated.kv_channels, gated.num_query_groups) == (128, 32, 2)
    assert gated.gated_linear_unit and gated.activation_func is F.silu


def test_biases_of_the_qkv_projection_come_with_all_biases_or_alone():
    assert build_config().add_qkv_bias
    assert not build_config(add_bias_linear=False).add_qkv_bias
    assert build_config(add_bias_linear=False, add_qkv_bias=True).add_qkv_bias


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({}, torch.float32), ({"bf16": True}, torch.bfloat16), ({"fp16": True}, torch.float16)],
)
def test_parameters_and_pipeline_have_the_training_precision(flags: dict[str, bool], dtype: torch.dtype):
    config = build_config(optimizer=flags)
    assert config.params_dtype == config.pipeline_dtype == dtype


def test_sequence_parallelism_is_off_without_tensor_parallelism():
    assert not build_config(parallel=ParallelConfig(sequence_parallel=True)).sequence_parallel
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    assert build_config(parallel=parallel).sequence_parallel


def test_pipeline_communication_overlaps_in_the_interleaved_schedule_alone():
    plain = build_config(parallel=ParallelConfig(pipeline_model_parallel_size=2))
    assert (plain.overlap_p2p_comm, plain.batch_p2p_comm) == (False, True)
    assert plain.virtual_pipeline_model_parallel_size is None
    interleaved = build_config(
        parallel=ParallelConfig(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)
    )
    assert (interleaved.overlap_p2p_comm, interleaved.batch_p2p_comm) == (True, False)
    assert interleaved.virtual_pipeline_model_parallel_size == 2


def test_scaling_by_layer_number_brings_softmax_in_fp32():
    assert not build_config().attention_softmax_in_fp32
    assert build_config(apply_query_key_layer_scaling=True).attention_softmax_in_fp32


def test_recomputing_activations_is_selective_recomputation():
    config = build_config(recompute_activations=True)
    assert (config.recompute_granularity, config.recompute_modules) == ("selective", ["core_attn"])


def test_xavier_initializes_every_layer():
    config = build_config(init_method_xavier_uniform=True)
    assert config.init_method is config.output_layer_init_method is torch.nn.init.xavier_uniform_


def test_the_gelu_of_the_flags_is_known():
    assert has_tanh_gelu(ModelConfig(**SIZES))
    assert not has_tanh_gelu(ModelConfig(**SIZES, bias_gelu_fusion=False))
    assert not has_tanh_gelu(ModelConfig(**SIZES, add_bias_linear=False))


def test_every_flag_of_fp8_is_a_field_of_megatron_cores_configuration():
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    ours = {flag.field for flag in declared_flags(ModelConfig) if "fp8" in flag.field or "bf16" in flag.field}
    assert len(ours) == 10 and ours <= fields
