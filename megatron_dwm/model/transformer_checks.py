"""Refusals of flags that contradict each other, or that need something this machine lacks."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dwm.config.flags import flag_name
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.optimizer import OptimizerConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.training import TrainingConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.kernels import is_importable

_DETERMINISTIC = {
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),  # Transformer Engine's
}
"""Environment variables of GPU libraries, and the values that make them deterministic."""

_ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
"""Environment variables of Transformer Engine by which megatron-core chooses the kernels of attention."""
_ATTENTION_VALUES = {"flash": "100", "fused": "010", "unfused": "001", "local": "000", "auto": "111"}
"""Their values for each ``--attention-backend``."""

_FP8_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Minimum compute capability of a GPU for each ``--fp8-recipe``, as Transformer Engine requires."""


def check_architecture(
    model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig, optimizer: OptimizerConfig
) -> None:
    """Refuse flags of the model that contradict each other or the training precision.

    Raises:
        UserError: they do.
    """
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
    if training.test_mode and model.qk_layernorm and model.normalization == "RMSNorm":
        raise UserError("--test-mode with --qk-layernorm compares biases, and RMSNorm has none; leave it out")
    if training.deterministic_mode and model.cross_entropy_loss_fusion:
        raise UserError("--deterministic-mode excludes --cross-entropy-loss-fusion; leave one out")
    if parallel.virtual_stages(model.num_layers) and not parallel.overlap_p2p_comm and parallel.pp == 2:
        raise UserError(
            "--no-overlap-p2p-communication with virtual stages and --pipeline-model-parallel-size 2: both "
            "neighbors of a stage are the same rank; leave it out or use 3 or more stages"
        )


def check_layers(model: ModelConfig, parallel: ParallelConfig, impl: str) -> None:
    """Refuse flags that the layers of ``impl`` (from ``resolve_transformer_impl``) cannot follow.

    Raises:
        UserError: they cannot follow a flag.
    """
    for field in ("dwm_qk_norm_all_heads", "dwm_output_norm"):
        if getattr(model, field) and impl != "torch":
            raise UserError(f"{flag_name(field)} needs --transformer-impl torch and the layers are {impl}; change one")
    if model.attention_backend == "local" and impl != "local":
        raise UserError("--attention-backend local needs --transformer-impl local; give that or another backend")
    if model.attention_backend in ("flash", "fused") and impl != "transformer_engine":
        raise UserError(
            f"--attention-backend {model.attention_backend} is a kernel of Transformer Engine, and the layers are "
            f"{impl}; give auto, or leave it out"
        )
    if parallel.cp > 1:
        check_context_parallelism(parallel, impl)
    if model.fp8 is not None and impl != "transformer_engine":
        raise UserError(
            f"--fp8-format {model.fp8} needs Transformer Engine's layers, and they are {impl}; train with --bf16"
        )
    if model.cross_entropy_loss_fusion and model.cross_entropy_fusion_impl == "te" and not HAVE_TE:
        raise UserError("--cross-entropy-fusion-impl te: Transformer Engine is not installed; use native")
    if impl == "transformer_engine" or (impl == "local" and is_importable("apex")):
        return
    if model.fp32_residual_connection:
        raise UserError(
            f"--fp32-residual-connection: the norms of --transformer-impl {impl} do not mix precisions; "
            "leave it out or use transformer_engine"
        )
    if model.layernorm_zero_centered_gamma and impl == "local":
        raise UserError(
            "--apply-layernorm-1p: the norms of --transformer-impl local need Apex for it; use --transformer-impl torch"
        )
    if impl == "local" and parallel.sequence_parallel and parallel.tp > 1:
        raise UserError(
            "--sequence-parallel: the norms of --transformer-impl local need Apex for it; use --transformer-impl torch"
        )


def check_context_parallelism(parallel: ParallelConfig, impl: str) -> None:
    """Refuse layers that do not attend across context-parallel ranks, or not in the way that is asked for.

    Raises:
        UserError: the layers of ``impl`` (from ``resolve_transformer_impl``) do not.
    """
    if impl == "local":
        raise UserError(
            f"--context-parallel-size {parallel.cp}: the attention of --transformer-impl local sees only this rank's "
            "part of the sequence; use --transformer-impl torch or transformer_engine"
        )
    kind = parallel.cp_comm_type[0]
    if impl == "torch" and kind in ("a2a", "a2a+p2p"):
        raise UserError(
            f"--cp-comm-type {kind} is for Transformer Engine's layers, and those of --transformer-impl torch gather "
            "keys and values; give all_gather, or leave it out"
        )


def check_attention_mask(model: ModelConfig, impl: str, device: torch.device) -> None:
    """Refuse layers that ignore an explicit attention mask: fused causal attention makes its own.

    Raises:
        UserError: the layers of ``impl`` (from ``resolve_transformer_impl``) do so on this device.
    """
    if impl == "transformer_engine":
        raise UserError(
            "--reset-attention-mask: Transformer Engine's causal attention ignores such a mask; "
            "use --transformer-impl torch"
        )
    if impl == "local" and model.window is not None:
        raise UserError(
            "--reset-attention-mask with --window-size: the attention of --transformer-impl local applies only one of "
            "the two masks; use --transformer-impl torch"
        )
    if impl == "local" and device.type == "cuda" and model.masked_softmax_fusion:
        raise UserError(
            "--reset-attention-mask: the fused softmax of --transformer-impl local ignores such a mask; "
            "add --no-masked-softmax-fusion or use --transformer-impl torch"
        )


def check_attention_variables(backend: str, impl: str, environment: MutableMapping[str, str]) -> None:
    """Refuse environment variables that choose other kernels of attention than ``backend``.

    megatron-core refuses them whatever the layers. Where Transformer Engine's layers are not used, they are removed.

    Raises:
        UserError: a variable contradicts ``--attention-backend``, and the layers are Transformer Engine's.
    """
    for name, value in zip(_ATTENTION_VARIABLES, _ATTENTION_VALUES[backend], strict=True):
        found = environment.get(name, value)
        if found == value:
            continue
        if impl == "transformer_engine":
            raise UserError(
                f"--attention-backend {backend}: the environment has {name}={found}, which is for other kernels; unset "
                "it, and choose the kernels by the flag"
            )
        del environment[name]


def check_determinism(impl: str, environment: Mapping[str, str]) -> None:
    """Refuse ``--deterministic-mode`` on a GPU if the environment lets libraries be nondeterministic.

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
    """Refuse FP8 on a GPU that does not support it.

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


def check_recomputation(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse flags of recomputation that contradict each other.

    Raises:
        UserError: they do.
    """
    granularity = model.recomputation
    newer = model.recompute_activations or model.recompute_granularity is not None
    if model.early_recompute_method is not None and newer:
        name = "checkpoint-activations" if model.checkpoint_activations else "activations-checkpoint-method"
        raise UserError(f"--{name} and newer flags of recomputation exclude each other; leave it out")
    if granularity == "selective" and (model.recompute_method, model.recompute_num_layers) != (None, None):
        raise UserError("--recompute-method and --recompute-num-layers go with --recompute-granularity full; drop them")
    if granularity == "full" and not model.early_recompute_method and model.recompute_num_layers is None:
        raise UserError("--recompute-granularity full needs --recompute-num-layers; give 1 or more")
    if model.dwm_output_norm and "layernorm" in (model.recompute_modules or ()):
        raise UserError(
            "--recompute-modules layernorm recomputes norms of inputs, and --dwm-output-norm has none; leave it out"
        )
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


def check_recomputed_units(config: TransformerConfig) -> None:
    """Refuse units of recomputed layers that do not divide the layers of every pipeline chunk.

    Raises:
        UserError: there is a chunk that they do not divide.
    """
    unit = config.recompute_num_layers
    if unit is None or (config.recompute_granularity, config.recompute_method) != ("full", "uniform"):
        return
    chunks = config.virtual_pipeline_model_parallel_size
    for rank in range(config.pipeline_model_parallel_size):
        if (layout := config.pipeline_model_parallel_layout) is not None:
            sizes = [stage.count(LayerType.decoder) for stage in layout.layout[rank]]
        else:
            sizes = [get_num_layers_to_build(config, n, rank) for n in (range(chunks) if chunks else [None])]
        for layers in sizes:
            if layers % unit:
                raise UserError(
                    f"--recompute-num-layers {unit}: units of --recompute-method uniform do not divide the {layers} "
                    f"layers of a chunk on pipeline rank {rank}; give a divisor of them, or --recompute-method block"
                )
