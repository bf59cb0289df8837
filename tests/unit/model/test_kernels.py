"""Layers and fused kernels, by the flags and by what the machine has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model import kernels
from megatron_dwm.model.kernels import resolve_transformer_impl
from tests.unit.model.configs import CPU, GPU, SIZES, build_config


def test_a_cpu_has_no_fused_kernels_and_the_same_functions():
    config = build_config(position_embedding_type="rope", cross_entropy_loss_fusion=True)
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
    assert torch.equal(build_config(bias_gelu_fusion=False).activation_func(x), exact)
    assert torch.equal(build_config(add_bias_linear=False).activation_func(x), exact)
    squared = build_config(squared_relu=True, bias_gelu_fusion=False)
    assert torch.equal(squared.activation_func(x), F.relu(x) ** 2)


def test_a_gpu_uses_the_compiled_fusions_and_leaves_out_kernels_that_are_not_installed():
    config = build_config(GPU, transformer_impl="torch", position_embedding_type="rope")
    assert config.bias_activation_fusion and config.bias_dropout_fusion
    assert config.activation_func is F.gelu
    assert config.deallocate_pipeline_outputs
    assert not config.gradient_accumulation_fusion


def test_the_layers_default_to_torch_without_transformer_engine():
    model = ModelConfig(**SIZES)
    assert resolve_transformer_impl(model, CPU) == "torch"
    assert resolve_transformer_impl(replace(model, transformer_impl="local"), CPU) == "local"
    assert build_config(transformer_impl="torch").transformer_impl == "local"
    with pytest.raises(UserError, match=r"--transformer-impl transformer_engine: .* use --transformer-impl torch"):
        resolve_transformer_impl(replace(model, transformer_impl="transformer_engine"), CPU)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({}, "transformer_engine"), ({"dwm_output_norm": True}, "torch")],
)
def test_layers_that_only_torch_has_are_torch_by_default(
    flags: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "HAVE_TE", True)
    assert resolve_transformer_impl(ModelConfig(**SIZES, **flags), GPU) == expected


def test_a_fused_loss_that_a_cpu_lacks_is_said(caplog: pytest.LogCaptureFixture):
    build_config()
    assert not caplog.records
    build_config(cross_entropy_loss_fusion=True)
    assert "--cross-entropy-loss-fusion" in caplog.text
