"""``--tp-comm-overlap``: Transformer Engine's layers overlap communication with computation, in preallocated buffers.

The calls are those of Megatron-LM, in its order: the buffers are created once, after the process groups and before the
model. They have the shape of one microbatch's activations, so that all passes must have this shape.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import is_te_min_version

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.errors import UserError
from megatron_dwm.special_files import read_text

MIN_TRANSFORMER_ENGINE = "1.9.0"
_WITH_QUANTIZATION_MODES = "2.7.0"


def check_tp_comm_overlap(parallel: ParallelConfig, impl: str) -> None:
    """Refuse configurations that cannot overlap communication.

    Args:
        impl: the result of ``resolve_transformer_impl``.

    Raises:
        UserError: the layers are not Transformer Engine's, or its version is too old, or sequence parallelism is off.
    """
    if not parallel.tp_comm_overlap:
        return
    if impl != "transformer_engine":
        raise UserError(
            f"--tp-comm-overlap is for Transformer Engine's layers, and the layers are {impl}; leave it out"
        )
    if parallel.tp < 2 or not parallel.sequence_parallel:
        raise UserError(
            "--tp-comm-overlap needs --sequence-parallel and --tensor-model-parallel-size 2 or more; add them"
        )
    if HAVE_TE and not is_te_min_version(MIN_TRANSFORMER_ENGINE):  # a plan is also made without it
        raise UserError(f"--tp-comm-overlap needs Transformer Engine {MIN_TRANSFORMER_ENGINE} or newer; update it")


def read_overlap_settings(path: str | None) -> dict[str, Any]:
    """Read ``--tp-comm-overlap-cfg``: how each layer's communication is overlapped.

    Raises:
        UserError: it is not a YAML file of such settings.
    """
    if path is None:
        return {}
    import yaml  # of transformers, which the weighter needs

    try:
        settings = yaml.safe_load(read_text(Path(path)))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--tp-comm-overlap-cfg {path}: cannot be read ({reason}); check the file") from None
    if not isinstance(settings, dict):
        raise UserError(f"--tp-comm-overlap-cfg {path}: it does not map names of layers to settings; check the file")
    return settings


def buffer_arguments(
    model: ModelConfig, parallel: ParallelConfig, config: TransformerConfig, micro_batch_size: int, modes: Any
) -> dict[str, Any]:
    """Return the arguments of Transformer Engine's ``initialize_ub``.

    Args:
        modes: Transformer Engine's ``UserBufferQuantizationMode``; None for versions that have none.
    """
    arguments: dict[str, Any] = {
        "shape": [model.seq_length * micro_batch_size // parallel.cp, model.hidden_size],
        "tp_size": parallel.tp,
        "ub_cfgs": read_overlap_settings(parallel.tp_comm_overlap_cfg),
        "bootstrap_backend": parallel.tp_comm_bootstrap_backend,
    }
    if modes is None:
        return {**arguments, "use_fp8": config.fp8 is not None}
    wanted = [modes.FP8 if config.fp8 is not None else modes.NONE]
    in_bf16 = config.num_layers_at_start_in_bf16 > 0 or config.num_layers_at_end_in_bf16 > 0
    if config.fp8 is not None and config.first_last_layers_bf16 and in_bf16:
        wanted.append(modes.NONE)
    return {**arguments, "quantization_modes": wanted}


def start_tp_comm_overlap(
    model: ModelConfig, parallel: ParallelConfig, config: TransformerConfig, micro_batch_size: int
) -> None:
    """Allocate the buffers, if the flags request them; a collective call of all ranks."""
    if not parallel.tp_comm_overlap:
        return
    from transformer_engine.pytorch import module

    modes = module.base.UserBufferQuantizationMode if is_te_min_version(_WITH_QUANTIZATION_MODES) else None
    module.base.initialize_ub(**buffer_arguments(model, parallel, config, micro_batch_size, modes))
