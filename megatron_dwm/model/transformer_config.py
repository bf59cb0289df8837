"""From the flags to megatron-core's TransformerConfig, the same one that Megatron-LM makes of them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.training import OptimizerConfig, TrainingConfig
from megatron_dwm.errors import UserError

_DETERMINISTIC = {
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),  # Transformer Engine's
}
"""What the libraries under a GPU's run read from the environment, and values that make them deterministic."""

_FP8_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    device: torch.device,
    *,
    resets_attention_mask: bool = False,
) -> TransformerConfig:
    """The configuration of the language model's layers, schedule and kernels.

    Flags that a TransformerConfig has under the same name are copied; the rest follows Megatron-LM's rules.
    Fused kernels are used where the flags ask for them and this machine has them.

    Args:
        resets_attention_mask: whether batches come with a mask of their own (``--reset-attention-mask``).

    Raises:
        UserError: flags that contradict each other, or that need something this machine lacks.
    """
    impl = resolve_transformer_impl(model, device)
    _check_architecture(model, parallel, training, optimizer)
    _check_layers(model, parallel, impl)
    if resets_attention_mask:
        check_attention_mask(model, impl, device)
    _check_recomputation(model, parallel)
    if device.type == "cuda":
        if training.deterministic_mode:
            check_determinism(impl, os.environ)
        if model.fp8 is not None:
            check_fp8(model, torch.cuda.get_device_capability(device))
    values = _same_named(model, parallel, training, optimizer)
    values.update(_architecture(model))
    values.update(_layout(model, parallel, device))
    values.update(_precision(optimizer))
    values.update(
        recompute_granularity=_recompute_granularity(model),
        inference_sampling_seed=training.seed,
        transformer_impl="transformer_engine" if impl == "transformer_engine" else "local",
        persist_layer_norm=not model.no_persist_layer_norm,
        cuda_graph_scope=[],  # megatron-core warns of its own default
    )
    values.update(_unfused(values) if device.type == "cpu" else _available_kernels(values, impl))
    try:
        return TransformerConfig(**values)
    except (ValueError, AssertionError) as error:  # its own checks; those above name flags and remedies
        raise UserError(f"megatron-core cannot combine the model's flags: {error}; change them") from error


def resolve_transformer_impl(model: ModelConfig, device: torch.device) -> str:
    """Which layers the model is built of: ``"transformer_engine"``, ``"local"`` or ``"torch"``.

    Raises:
        UserError: Transformer Engine is asked for and cannot be used.
    """
    usable = HAVE_TE and device.type == "cuda"
    if model.transformer_impl is None:
        return "transformer_engine" if usable else "torch"
    if model.transformer_impl == "transformer_engine" and not usable:
        reason = "it needs a GPU" if HAVE_TE else "Transformer Engine is not installed"
        raise UserError(f"--transformer-impl transformer_engine: {reason}; use --transformer-impl torch")
    return model.transformer_impl


def has_tanh_gelu(model: ModelConfig) -> bool:
    """Whether GELU is its tanh approximation: Megatron-LM's is with the bias fused in, and exact without."""
    return model.bias_gelu_fusion and model.add_bias_linear


def _same_named(*configs: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
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
        "apply_rope_fusion": model.apply_rope_fusion and model.positions == "rope",
        "bias_activation_fusion": model.bias_gelu_fusion and model.add_bias_linear,
    }
    if model.swiglu:
        values.update(activation_func=F.silu, gated_linear_unit=True, bias_activation_fusion=model.bias_swiglu_fusion)
    elif model.squared_relu:
        values.update(activation_func=squared_relu)
    else:
        values.update(activation_func=F.gelu)
    if model.init_method_xavier_uniform:
        xavier = torch.nn.init.xavier_uniform_
        values.update(init_method=xavier, output_layer_init_method=xavier)
    return values


def _layout(model: ModelConfig, parallel: ParallelConfig, device: torch.device) -> dict[str, Any]:
    virtual_stages = parallel.virtual_stages(model.layers)
    overlap = parallel.overlap_p2p_comm and virtual_stages is not None
    return {
        "sequence_parallel": parallel.sequence_parallel and parallel.tp > 1,
        "virtual_pipeline_model_parallel_size": virtual_stages,
        "overlap_p2p_comm": overlap,
        "batch_p2p_comm": not overlap,
        # Gloo reads an output while it is being sent; freeing it would send what comes to lie in its place.
        "deallocate_pipeline_outputs": device.type == "cuda",
        "cp_comm_type": "p2p",
    }


def _precision(optimizer: OptimizerConfig) -> dict[str, Any]:
    dtype = torch.bfloat16 if optimizer.bf16 else torch.float16 if optimizer.fp16 else torch.float32
    return {"params_dtype": dtype, "pipeline_dtype": dtype}


def _recompute_granularity(model: ModelConfig) -> str | None:
    return "selective" if model.recompute_activations else model.recompute_granularity


def _unfused(values: dict[str, Any]) -> dict[str, Any]:
    """No fused kernels and nothing that is compiled when first called, for a CPU; the same function."""
    plain: dict[str, Any] = dict.fromkeys(
        (
            "apply_rope_fusion",
            "bias_activation_fusion",
            "bias_dropout_fusion",
            "cross_entropy_loss_fusion",
            "gradient_accumulation_fusion",
            "masked_softmax_fusion",
            "persist_layer_norm",
        ),
        False,
    )
    if values["activation_func"] is F.gelu and values["bias_activation_fusion"]:
        plain["activation_func"] = functools.partial(F.gelu, approximate="tanh")
    elif values["activation_func"] is squared_relu:
        plain["activation_func"] = inspect.unwrap(squared_relu)
    return plain


def _available_kernels(values: dict[str, Any], impl: str) -> dict[str, Any]:
    """Of the fused kernels that the flags ask for, by default all, those that are installed."""
    has_apex_norm = impl != "local" or (_importable("apex") and values["normalization"] == "LayerNorm")
    available = {
        "apply_rope_fusion": rope_utils.fused_apply_rotary_pos_emb is not None,
        # Transformer Engine's layers could do without Apex's extension; megatron-core's output layer cannot.
        "gradient_accumulation_fusion": _importable("fused_weight_gradient_mlp_cuda"),
        "masked_softmax_fusion": _importable("scaled_upper_triang_masked_softmax_cuda"),
        "persist_layer_norm": has_apex_norm,
    }
    return {name: values[name] and found for name, found in available.items()}


def _importable(module: str) -> bool:
    # A compiled extension can be installed and yet fail to load, so looking for its file is not enough.
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _check_architecture(
    model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig, optimizer: OptimizerConfig
) -> None:
    if model.squared_relu and model.bias_gelu_fusion and model.add_bias_linear:
        raise UserError("--squared-relu cannot be fused with biases; add --no-bias-gelu-fusion")
    if model.fp32_residual_connection and not (optimizer.fp16 or optimizer.bf16):
        raise UserError("--fp32-residual-connection is for --fp16 and --bf16; leave it out or give one")
    if model.fp32_residual_connection and parallel.pp > 1:
        raise UserError(
            f"--fp32-residual-connection with --pipeline-model-parallel-size {parallel.pp}: stages exchange "
            "16-bit tensors; leave it out"
        )
    if optimizer.fp16_lm_cross_entropy and not optimizer.fp16:
        raise UserError("--fp16-lm-cross-entropy is for --fp16; leave it out or give that")
    if training.deterministic_mode and model.cross_entropy_loss_fusion:
        raise UserError("--deterministic-mode excludes --cross-entropy-loss-fusion; leave one out")
    if parallel.virtual_stages(model.layers) and not parallel.overlap_p2p_comm and parallel.pp == 2:
        raise UserError(
            "--no-overlap-p2p-communication with virtual stages and --pipeline-model-parallel-size 2: both "
            "neighbors of a stage are the same rank; leave it out or use 3 or more stages"
        )


def _check_layers(model: ModelConfig, parallel: ParallelConfig, impl: str) -> None:
    if model.attention_backend == "local" and impl != "local":
        raise UserError("--attention-backend local needs --transformer-impl local; give that or another backend")
    if model.attention_backend in ("flash", "fused", "unfused") and impl != "transformer_engine":
        raise UserError(
            f"--attention-backend {model.attention_backend} chooses among Transformer Engine's and the layers are "
            f"{impl}; leave it out"
        )
    if model.fp8 is not None and impl != "transformer_engine":
        raise UserError(
            f"--fp8-format {model.fp8} needs Transformer Engine's layers and they are {impl}; train with --bf16"
        )
    if model.cross_entropy_loss_fusion and model.cross_entropy_fusion_impl == "te" and not HAVE_TE:
        raise UserError("--cross-entropy-fusion-impl te: Transformer Engine is not installed; use native")
    if impl == "transformer_engine" or (impl == "local" and _importable("apex")):
        return
    if model.fp32_residual_connection:
        raise UserError(
            f"--fp32-residual-connection: the norms of --transformer-impl {impl} do not mix precisions; "
            "leave it out or use transformer_engine"
        )
    if model.layernorm_zero_centered_gamma:
        raise UserError(
            f"--apply-layernorm-1p: the norms of --transformer-impl {impl} cannot; leave it out or use "
            "transformer_engine"
        )
    if impl == "local" and parallel.sequence_parallel and parallel.tp > 1:
        raise UserError(
            "--sequence-parallel: the norms of --transformer-impl local cannot without Apex; use "
            "--transformer-impl torch"
        )


def check_attention_mask(model: ModelConfig, impl: str, device: torch.device) -> None:
    """Refuse layers that ignore an explicit attention mask: fused causal attention makes its own.

    Raises:
        UserError: ``impl`` (what :func:`resolve_transformer_impl` returned) is such on this device.
    """
    if impl == "transformer_engine":
        raise UserError(
            "--reset-attention-mask: Transformer Engine's causal attention ignores such a mask; "
            "use --transformer-impl torch"
        )
    if impl == "local" and device.type == "cuda" and model.masked_softmax_fusion:
        raise UserError(
            "--reset-attention-mask: the fused softmax of --transformer-impl local ignores such a mask; "
            "add --no-masked-softmax-fusion or use --transformer-impl torch"
        )


def check_determinism(impl: str, environment: Mapping[str, str]) -> None:
    """Refuse ``--deterministic-mode`` on a GPU in an environment that lets libraries be otherwise.

    Raises:
        UserError: a variable is not set as it must be.
    """
    for name, values in _DETERMINISTIC.items():
        if name.startswith("NVTE") and impl != "transformer_engine":
            continue
        found = environment.get(name)
        if found not in values:
            raise UserError(f"--deterministic-mode: the environment has {name}={found or ''}; set it to {values[0]}")


def check_fp8(model: ModelConfig, capability: tuple[int, int]) -> None:
    """Refuse FP8 on a GPU that has none.

    Args:
        capability: the GPU's compute capability.

    Raises:
        UserError: it is less than the recipe needs.
    """
    needed = _FP8_CAPABILITY[model.fp8_recipe]
    if capability < needed:
        raise UserError(
            f"--fp8-format {model.fp8} with --fp8-recipe {model.fp8_recipe} needs a GPU of compute capability "
            f"{needed[0]}.{needed[1]} and this one has {capability[0]}.{capability[1]}; train with --bf16"
        )


def _check_recomputation(model: ModelConfig, parallel: ParallelConfig) -> None:
    granularity = _recompute_granularity(model)
    if granularity == "selective" and (model.recompute_method, model.recompute_num_layers) != (None, None):
        raise UserError("--recompute-method and --recompute-num-layers go with --recompute-granularity full; drop them")
    if granularity == "full" and model.recompute_num_layers is None:
        raise UserError("--recompute-granularity full needs --recompute-num-layers; give 1 or more")
    # megatron-core recomputes norms with Transformer Engine's help, whatever the layers.
    choices = ["core_attn", "mlp", "layernorm"] if HAVE_TE else ["core_attn", "mlp"]
    for module in model.recompute_modules or ():
        if module not in choices:
            reason = " needs Transformer Engine" if module == "layernorm" else ""
            raise UserError(f"--recompute-modules {module}{reason}; choose from {', '.join(choices)}")
    if model.distribute_saved_activations:
        if granularity != "full" or parallel.tp < 2:
            raise UserError(
                "--distribute-saved-activations needs --recompute-granularity full and "
                f"--tensor-model-parallel-size 2 or more, not {parallel.tp}; leave it out"
            )
        if parallel.sequence_parallel:
            raise UserError("--distribute-saved-activations excludes --sequence-parallel; leave one out")
