"""megatron-core's optimizer, from the flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.optimizer import OptimizerConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.profiling import ProfilingConfig
from megatron_dwm.model.optimizer_parts import optimizer_parts
from megatron_dwm.model.protocols import ModelChunk, Optimizer
from megatron_dwm.model.transformer_config import same_named


def build_optimizer(
    settings: OptimizerConfig,
    model: ModelConfig,
    parallel: ParallelConfig,
    profiling: ProfilingConfig,
    chunks: Sequence[ModelChunk],
) -> Optimizer:
    """Build megatron-core's optimizer over DDP ``chunks``."""
    from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.optimizer.optimizer_config import AdamOptimizerConfig, SGDOptimizerConfig

    kind = AdamOptimizerConfig if settings.optimizer == "adam" else SGDOptimizerConfig
    core_config = kind(**same_named(kind, settings, model, parallel, profiling))
    core_config.params_dtype = settings.params_dtype
    core_config.apply_wd_to_qk_layernorm = settings.should_decay_qk_layernorm
    optimizer: Optimizer = get_megatron_optimizer(
        core_config,
        list(chunks),
        config_overrides=get_standard_config_overrides(config=core_config),
        use_gloo_process_groups=parallel.enable_gloo_process_groups,
    )
    for part in optimizer_parts(optimizer):
        part.init_state_fn = _allocate  # megatron-core's own supports only Adam, without the step count of torch's Adam
    return optimizer


def allocate_state(optimizer: Optimizer) -> None:
    """Create the initial state, zeros, of an optimizer that has not made a step yet.

    A checkpoint is loaded into existing state, and only existing state is saved. Torch's optimizers have none
    before their first step, while megatron-core relies on Transformer Engine's or Apex's Adam, which do.
    """
    for part in optimizer_parts(optimizer):
        if part.optimizer is not None:
            _allocate(part.optimizer)


def _allocate(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    if optimizer.state:
        return
    for group in optimizer.param_groups:
        for param in group["params"]:
            if state := _initial_state(optimizer, group, param):
                optimizer.state[param] = state


def _initial_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
    if "betas" not in group:
        return {"momentum_buffer": torch.zeros_like(param)} if group["momentum"] else {}
    state = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
    return state if has_steps_in_groups(optimizer) else {**state, "step": torch.zeros(())}


def has_steps_in_groups(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether Adam counts its steps per parameter group (Transformer Engine, Apex), not per parameter."""
    return not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
