"""Flags that contradict each other, or need what the machine lacks, are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.optimizer import OptimizerConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.training import TrainingConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.transformer_checks import (
    check_attention_mask,
    check_attention_variables,
    check_determinism,
    check_fp8,
)
from megatron_dwm.model.transformer_config import transformer_config
from tests.unit.model.configs import CPU, GPU, SIZES, build_config

TP2 = {"tensor_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
RMS_NORM = {"normalization": "RMSNorm"}
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
        (
            "--apply-layernorm-1p: .* use --transformer-impl torch",
            {"layernorm_zero_centered_gamma": True, "transformer_impl": "local"},
            {},
            {},
        ),
        (
            "--dwm-output-norm needs --transformer-impl torch and the layers are local",
            {"dwm_output_norm": True, "transformer_impl": "local"},
            {},
            {},
        ),
        (
            "--dwm-qk-norm-all-heads needs --transformer-impl torch",
            {**RMS_NORM, "qk_layernorm": True, "dwm_qk_norm_all_heads": True, "transformer_impl": "local"},
            {},
            {},
        ),
        (
            "--recompute-modules layernorm recomputes norms of inputs",
            {"dwm_output_norm": True, "recompute_activations": True, "recompute_modules": ["layernorm"]},
            {},
            {},
        ),
        ("--transformer-impl local", {"transformer_impl": "local"}, TP2 | {"sequence_parallel": True}, {}),
        ("--recompute-method", {"recompute_activations": True, "recompute_method": "block"}, {}, {}),
        ("--recompute-num-layers", FULL, {}, {}),
        ("--recompute-modules moe_act", {"recompute_activations": True, "recompute_modules": ["moe_act"]}, {}, {}),
        ("--recompute-modules layernorm", {"recompute_activations": True, "recompute_modules": ["layernorm"]}, {}, {}),
        ("--transformer-impl local sees only this rank's part", {"transformer_impl": "local"}, CP2, {}),
        ("--cp-comm-type a2a is for Transformer Engine's layers", {}, CP2 | {"cp_comm_type": ["a2a"]}, {}),
        ("megatron-core cannot", {}, {"tensor_model_parallel_size": 3}, {}),
        ("--attention-backend flash", {"attention_backend": "flash"}, {}, {}),
        (
            "--attention-backend fused .* the layers are local",
            {"attention_backend": "fused", "transformer_impl": "local"},
            {},
            {},
        ),
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
        build_config(parallel=ParallelConfig(**parallel), optimizer=optimizer, **model)
    assert "\n" not in str(caught.value)


PP2: dict[str, Any] = {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("unit", "parallel", "layers"),
    [
        (3, {}, 4),
        (1, {}, None),
        (2, {}, None),
        (4, PP2, 2),
        (2, PP2, None),
        (2, PP2 | {"num_layers_per_virtual_pipeline_stage": 1}, 1),
        (2, PP2 | {"decoder_first_pipeline_num_layers": 1}, 1),
        (2, PP2 | {"pipeline_model_parallel_layout": "Et|tttL"}, 1),
        (2, PP2 | {"pipeline_model_parallel_layout": "Ett|ttL"}, None),
    ],
)
def test_units_of_recomputed_layers_divide_each_chunk(unit: int, parallel: dict[str, Any], layers: int | None):
    flags = FULL | {"recompute_num_layers": unit}
    if layers is None:
        assert build_config(parallel=ParallelConfig(**parallel), **flags).recompute_num_layers == unit
    else:
        with pytest.raises(UserError, match=f"--recompute-num-layers {unit}: .* the {layers} layers of a chunk"):
            build_config(parallel=ParallelConfig(**parallel), **flags)


def test_layers_without_transformer_engine_can_be_unfused():
    for impl in ("local", "torch"):
        config = build_config(transformer_impl=impl, attention_backend="unfused")
        assert config.attention_backend is AttnBackend.unfused


def test_variables_of_transformer_engine_do_not_contradict_the_flag():
    environment = {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "0"}
    check_attention_variables("flash", "transformer_engine", environment)
    with pytest.raises(UserError, match="--attention-backend auto: the environment has NVTE_FUSED_ATTN=0"):
        check_attention_variables("auto", "transformer_engine", environment)
    check_attention_variables("auto", "torch", environment)  # which do not read them; megatron-core would refuse them
    assert environment == {"NVTE_FLASH_ATTN": "1"}


def test_deterministic_mode_excludes_the_fused_cross_entropy():
    with pytest.raises(UserError, match="--cross-entropy-loss-fusion"):
        build_config(training={"deterministic_mode": True}, cross_entropy_loss_fusion=True)


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
        transformer_config(model, ParallelConfig(), training, optimizer, GPU, has_attention_mask=True)


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
