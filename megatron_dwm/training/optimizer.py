"""megatron-core's optimizer, from the flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_dwm.config.run import RunConfig
from megatron_dwm.model.optimizer_parts import optimizer_parts
from megatron_dwm.model.protocols import ModelChunk, Optimizer
from megatron_dwm.model.transformer_config import params_dtype


def build_optimizer(config: RunConfig, chunks: Sequence[ModelChunk]) -> Optimizer:
    """megatron-core's optimizer over DDP ``chunks``."""
    from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.optimizer.optimizer_config import AdamOptimizerConfig, SGDOptimizerConfig

    settings = config.optimizer
    kind = AdamOptimizerConfig if settings.optimizer == "adam" else SGDOptimizerConfig
    flags = config.flat()
    same_name = {f.name: flags[f.name] for f in dataclasses.fields(kind) if f.name in flags}
    core_config = kind(**same_name)
    core_config.params_dtype = params_dtype(settings)
    optimizer: Optimizer = get_megatron_optimizer(
        core_config,
        list(chunks),
        config_overrides=get_standard_config_overrides(config=core_config),
        use_gloo_process_groups=config.parallel.enable_gloo_process_groups,
    )
    return optimizer


def allocate_state(optimizer: Optimizer) -> None:
    """Give a new distributed optimizer the state that a checkpoint is loaded into.

    megatron-core counts on Transformer Engine's or Apex's Adam to have some; torch's has none before its first step.
    The parameters may move: they are loaded next.
    """
    for part in _distributed(optimizer):
        if not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict`` that also holds for torch's Adam under the distributed optimizer.

    torch keeps a step count for each parameter. megatron-core hands all of them one tensor, which would then be
    counted up once a parameter, and does not find it among the tensors of a fully reshardable checkpoint.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())  # fp32 shards are views of parameters that ask for gradients
        for part in _distributed(optimizer):
            stack.enter_context(_keeping_steps(part))
        optimizer.load_state_dict(state)
    for part in _distributed(optimizer):
        for own in part.optimizer.state.values():
            if isinstance(own.get("step"), torch.Tensor):
                own["step"] = own["step"].clone()


@contextmanager
def _keeping_steps(part: Any) -> Iterator[None]:
    """While open, tensors are loaded into ``part`` without their step, which came with the parameter groups."""
    set_states = part._set_main_param_and_optimizer_states

    def set_states_but_step(model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        own = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        kept = {"step": own["step"]} if isinstance(own.get("step"), torch.Tensor) else {}
        set_states(model_param, tensors | kept)

    part._set_main_param_and_optimizer_states = set_states_but_step
    try:
        yield
    finally:
        del part._set_main_param_and_optimizer_states


def _distributed(optimizer: Optimizer) -> list[Any]:
    return [part for part in optimizer_parts(optimizer) if isinstance(part, DistributedOptimizer)]
