"""The flags become the TransformerConfig that Megatron-LM makes of them."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dwm.config.flags import declared_flags
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.training import OptimizerConfig, TrainingConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.transformer_config import (
    check_attention_mask,
    check_determinism,
    check_fp8,
    has_tanh_gelu,
    resolve_transformer_impl,
    transformer_config,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 16,
    "max_position_embeddings": 16,
}


def _config(
    device: torch.device = CPU,
    parallel: ParallelConfig | None = None,
    training: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **model: Any,
):
    return transformer_config(
        ModelConfig(**(SIZES | model)),
        parallel or ParallelConfig(),
        TrainingConfig(**({"micro_batch_size": 1, "train_iters": 1} | (training or {}))),
        OptimizerConfig(**({"lr": 1e-3} | (optimizer or {}))),
        device,
    )


def test_flags_of_the_same_name_are_copied():
    config = _config(
        training={"use_cpu_initialization": True, "seed": 5},
        hidden_dropout=0.3,
        layernorm_epsilon=1e-6,
        init_method_std=0.01,
        embedding_init_method_std=1.0,
        qk_layernorm=True,
        calculate_per_token_loss=True,
    )
    assert (config.num_layers, config.hidden_size, config.hidden_dropout) == (4, 64, 0.3)
    assert (config.layernorm_epsilon, config.init_method_std, config.embedding_init_method_std) == (
        1e-6,
        0.01,
        1.0,
    )
    assert config.qk_layernorm and config.calculate_per_token_loss and config.use_cpu_initialization
    assert config.attention_backend is AttnBackend.auto
    assert config.inference_sampling_seed == 5


def test_sizes_follow_megatrons_rules():
    plain = _config()
    assert (plain.ffn_hidden_size, plain.kv_channels, plain.num_query_groups) == (256, 16, 4)
    gated = _config(swiglu=True, group_query_attention=True, num_query_groups=2, kv_channels=32, add_bias_linear=False)
    assert (gated.ffn_hidden_size, gated.kv_channels, gated.num_query_groups) == (128, 32, 2)
    assert gated.gated_linear_unit and gated.activation_func is F.silu


def test_biases_of_the_qkv_projection_come_with_all_biases_or_alone():
    assert _config().add_qkv_bias
    assert not _config(add_bias_linear=False).add_qkv_bias
    assert _config(add_bias_linear=False, add_qkv_bias=True).add_qkv_bias


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [({}, torch.float32), ({"bf16": True}, torch.bfloat16), ({"fp16": True}, torch.float16)],
)
def test_parameters_and_pipeline_have_the_training_precision(flags: dict[str, bool], dtype: torch.dtype):
    config = _config(optimizer=flags)
    assert config.params_dtype == config.pipeline_dtype == dtype


def test_sequence_parallelism_is_off_without_tensor_parallelism():
    assert not _config(parallel=ParallelConfig(sequence_parallel=True)).sequence_parallel
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    assert _config(parallel=parallel).sequence_parallel


def test_pipeline_communication_overlaps_in_the_interleaved_schedule_alone():
    plain = _config(parallel=ParallelConfig(pipeline_model_parallel_size=2))
    assert (plain.overlap_p2p_comm, plain.batch_p2p_comm) == (False, True)
    assert plain.virtual_pipeline_model_parallel_size is None
    interleaved = _config(
        parallel=ParallelConfig(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)
    )
    assert (interleaved.overlap_p2p_comm, interleaved.batch_p2p_comm) == (True, False)
    assert interleaved.virtual_pipeline_model_parallel_size == 2


def test_scaling_by_layer_number_brings_softmax_in_fp32():
    assert not _config().attention_softmax_in_fp32
    assert _config(apply_query_key_layer_scaling=True).attention_softmax_in_fp32


def test_recomputing_activations_is_selective_recomputation():
    config = _config(recompute_activations=True)
    assert (config.recompute_granularity, config.recompute_modules) == ("selective", ["core_attn"])


def test_xavier_initializes_every_layer():
    config = _config(init_method_xavier_uniform=True)
    assert config.init_method is config.output_layer_init_method is torch.nn.init.xavier_uniform_


def test_a_cpu_has_no_fused_kernels_and_the_same_functions():
    config = _config(position_embedding_type="rope", cross_entropy_loss_fusion=True)
    fused = (
        config.bias_activation_fusion,
        config.bias_dropout_fusion,
        config.masked_softmax_fusion,
        config.gradient_accumulation_fusion,
        config.persist_layer_norm,
        config.apply_rope_fusion,
        config.cross_entropy_loss_fusion,
    )
    assert not any(fused)
    x = torch.linspace(-3, 3, 31)
    tanh, exact = F.gelu(x, approximate="tanh"), F.gelu(x)
    assert not torch.equal(tanh, exact)
    assert torch.equal(config.activation_func(x), tanh)
    assert torch.equal(_config(bias_gelu_fusion=False).activation_func(x), exact)
    assert torch.equal(_config(add_bias_linear=False).activation_func(x), exact)
    squared = _config(squared_relu=True, bias_gelu_fusion=False)
    assert torch.equal(squared.activation_func(x), F.relu(x) ** 2)


def test_the_gelu_of_the_flags_is_known():
    assert has_tanh_gelu(ModelConfig(**SIZES))
    assert not has_tanh_gelu(ModelConfig(**SIZES, bias_gelu_fusion=False))
    assert not has_tanh_gelu(ModelConfig(**SIZES, add_bias_linear=False))


def test_a_gpu_uses_the_compiled_fusions_and_leaves_out_kernels_that_are_not_installed():
    config = _config(GPU, transformer_impl="torch", position_embedding_type="rope")
    assert config.bias_activation_fusion and config.bias_dropout_fusion
    assert config.activation_func is F.gelu
    assert config.deallocate_pipeline_outputs
    assert not config.gradient_accumulation_fusion


def test_the_layers_default_to_torch_without_transformer_engine():
    model = ModelConfig(**SIZES)
    assert resolve_transformer_impl(model, CPU) == "torch"
    assert resolve_transformer_impl(replace(model, transformer_impl="local"), CPU) == "local"
    assert _config(transformer_impl="torch").transformer_impl == "local"
    with pytest.raises(UserError, match=r"--transformer-impl transformer_engine: .* use --transformer-impl torch"):
        resolve_transformer_impl(replace(model, transformer_impl="transformer_engine"), CPU)


TP2 = {"tensor_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform"}


@pytest.mark.parametrize(
    ("named", "model", "parallel", "optimizer"),
    [
        ("--squared-relu", {"squared_relu": True}, {}, {}),
        ("--fp32-residual-connection", {"fp32_residual_connection": True}, {}, {}),
        ("--fp32-residual-connection", {"fp32_residual_connection": True}, {}, {"bf16": True}),
        ("--fp16-lm-cross-entropy", {}, {}, {"fp16_lm_cross_entropy": True}),
        (
            "--no-overlap-p2p-communication",
            {},
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_per_virtual_pipeline_stage": 1,
                "overlap_p2p_comm": False,
            },
            {},
        ),
        ("--attention-backend local", {"attention_backend": "local"}, {}, {}),
        (
            "--cross-entropy-fusion-impl te",
            {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"},
            {},
            {},
        ),
        ("--apply-layernorm-1p", {"layernorm_zero_centered_gamma": True}, {}, {}),
        ("--transformer-impl local", {"transformer_impl": "local"}, TP2 | {"sequence_parallel": True}, {}),
        ("--recompute-method", {"recompute_activations": True, "recompute_method": "block"}, {}, {}),
        ("--recompute-num-layers", FULL, {}, {}),
        ("--recompute-modules moe_act", {"recompute_activations": True, "recompute_modules": ["moe_act"]}, {}, {}),
        ("--recompute-modules layernorm", {"recompute_activations": True, "recompute_modules": ["layernorm"]}, {}, {}),
        ("megatron-core cannot", {}, {"tensor_model_parallel_size": 3}, {}),
        ("--attention-backend flash", {"attention_backend": "flash"}, {}, {}),
        ("--fp8-format hybrid needs Transformer Engine", {"fp8": "hybrid", "fp8_margin": 1}, {}, {}),
        ("--distribute-saved-activations", {"distribute_saved_activations": True}, TP2, {}),
        (
            "--sequence-parallel",
            FULL | {"recompute_num_layers": 1, "distribute_saved_activations": True},
            TP2 | {"sequence_parallel": True},
            {},
        ),
    ],
)
def test_flags_that_cannot_go_together_are_named(
    named: str, model: dict[str, Any], parallel: dict[str, Any], optimizer: dict[str, Any]
):
    with pytest.raises(UserError, match=named) as caught:
        _config(parallel=ParallelConfig(**parallel), optimizer=optimizer, **model)
    assert "\n" not in str(caught.value)


def test_deterministic_mode_excludes_the_fused_cross_entropy():
    with pytest.raises(UserError, match="--cross-entropy-loss-fusion"):
        _config(training={"deterministic_mode": True}, cross_entropy_loss_fusion=True)


@pytest.mark.parametrize(
    ("impl", "device", "changes", "remedy"),
    [
        ("transformer_engine", GPU, {}, "use --transformer-impl torch"),
        ("local", GPU, {}, "add --no-masked-softmax-fusion"),
        ("local", GPU, {"masked_softmax_fusion": False}, None),
        ("local", CPU, {}, None),
        ("torch", GPU, {}, None),
    ],
)
def test_attention_that_would_ignore_a_mask_is_refused(
    impl: str, device: torch.device, changes: dict[str, Any], remedy: str | None
):
    model = ModelConfig(**(SIZES | changes))
    if remedy is None:
        check_attention_mask(model, impl, device)
    else:
        with pytest.raises(UserError, match=f"--reset-attention-mask: .*{remedy}"):
            check_attention_mask(model, impl, device)


def test_the_mask_is_checked_on_the_way_to_the_configuration():
    training, optimizer = TrainingConfig(micro_batch_size=1, train_iters=1), OptimizerConfig(lr=1e-3)
    model = ModelConfig(**SIZES, transformer_impl="local")
    with pytest.raises(UserError, match="--reset-attention-mask"):
        transformer_config(model, ParallelConfig(), training, optimizer, GPU, resets_attention_mask=True)


def test_every_flag_of_fp8_is_a_field_of_megatron_cores_configuration():
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    ours = {flag.field for flag in declared_flags(ModelConfig) if "fp8" in flag.field or "bf16" in flag.field}
    assert len(ours) == 10 and ours <= fields


@pytest.mark.parametrize(
    ("recipe", "capability", "needed"),
    [
        ("delayed", (8, 0), "8.9"),
        ("delayed", (8, 9), None),
        ("blockwise", (8, 9), "9.0"),
        ("mxfp8", (9, 0), "10.0"),
        ("mxfp8", (10, 0), None),
    ],
)
def test_fp8_is_refused_on_a_gpu_that_has_none(recipe: Any, capability: tuple[int, int], needed: str | None):
    model = ModelConfig(**SIZES, fp8="hybrid", fp8_recipe=recipe)
    if needed is None:
        check_fp8(model, capability)
    else:
        with pytest.raises(UserError, match=f"--fp8-format hybrid .*capability {needed} .*; train with --bf16"):
            check_fp8(model, capability)


def test_deterministic_mode_needs_an_environment_that_allows_it():
    settings = {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    check_determinism("torch", settings)
    check_determinism("transformer_engine", settings | {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"})
    with pytest.raises(UserError, match=r"--deterministic-mode: .* NVTE_ALLOW_NONDETERMINISTIC_ALGO=; set it to 0"):
        check_determinism("transformer_engine", settings)
    with pytest.raises(UserError, match="NCCL_ALGO=NVLS; set it to Ring"):
        check_determinism("torch", settings | {"NCCL_ALGO": "NVLS"})
