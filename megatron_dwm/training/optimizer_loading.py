"""Putting loaded state into the run's optimizer; hyperparameters stay those of the flags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_dwm.model.optimizer_parts import optimizer_parts
from megatron_dwm.model.protocols import Optimizer
from megatron_dwm.training.optimizer import allocate_state, has_steps_in_groups

PARAM = "param"
"""Name of a parameter's fp32 value among its state tensors."""


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load state that was saved by the same kind of optimizer; hyperparameters stay those of the flags.

    Unlike megatron-core's ``load_state_dict`` this works for torch's optimizers, and for parameter groups that differ
    only in their learning rates, which megatron-core takes for one group.
    """
    part = only_part(optimizer)
    inner = inner_state(state)
    step = saved_step(inner)
    with ExitStack() as stack:
        stack.enter_context(keeping_hyperparameters(part))
        stack.enter_context(torch.no_grad())  # fp32 shards are views of parameters that require gradients
        if isinstance(part, DistributedOptimizer):
            stack.enter_context(keeping_steps(part))
        inner["param_groups"] = part.optimizer.state_dict()["param_groups"]
        for group in inner["param_groups"] if step is not None else ():
            group["step"] = step
        optimizer.load_state_dict(state)
    _set_step(part.optimizer, step)


def saved_step(inner: Mapping[str, Any]) -> float | None:
    """Return the number of steps of an optimizer when its state was saved; None if it does not count them."""
    step = inner.get("state", {}).get("common_step")
    if step is None:
        step = next((group["step"] for group in inner.get("param_groups", ()) if "step" in group), None)
    return None if step is None else float(step)


@contextmanager
def keeping_hyperparameters(part: Any) -> Iterator[None]:
    """Make the parameter groups distinguishable for megatron-core inside the context; restore them afterwards."""
    before = [{key: value for key, value in group.items() if key != "params"} for group in part.optimizer.param_groups]
    for number, group in enumerate(part.optimizer.param_groups):
        group["is_decoupled_lr"] = number
    yield
    for group, values in zip(part.optimizer.param_groups, before, strict=True):
        group.pop("step", None)
        group.update(values)


def only_part(optimizer: Optimizer) -> Any:
    """Return the one part that the optimizer of a dense model has."""
    (part,) = optimizer_parts(optimizer)  # there is more than one only with experts
    return part


def inner_state(state: Any) -> Any:
    """Return the part of an optimizer's state that is the wrapped optimizer's."""
    return state["optimizer"] if isinstance(state.get("optimizer"), dict) else state


def _set_step(optimizer: torch.optim.Optimizer, step: float | None) -> None:
    if has_steps_in_groups(optimizer):
        if step is not None:
            for group in optimizer.param_groups:
                group["step"] = int(step)
        return
    for state in optimizer.state.values():
        # A separate tensor each: a shared one would be incremented once per parameter.
        state["step"] = torch.tensor(step or 0.0)


def set_states(
    optimizer: Optimizer,
    by_parameter: Mapping[torch.nn.Parameter, Mapping[str, torch.Tensor]],
    step: float | None,
    grad_scaler: Mapping[str, Any] | None,
) -> None:
    """Give each parameter its fp32 value and its state; tensors have the parameter's shape."""
    allocate_state(optimizer)
    part = only_part(optimizer)
    with torch.no_grad():
        for param, tensors in by_parameter.items():
            param.copy_(tensors[PARAM])
            if isinstance(part, DistributedOptimizer):
                _set_shard(part, param, tensors)
                continue
            main = getattr(param, "main_param", param)  # megatron-core's fp32 copy of a half-precision parameter
            main.copy_(tensors[PARAM])
            for name, value in part.optimizer.state[main].items():
                if name in tensors:
                    value.copy_(tensors[name])
    _set_step(part.optimizer, step)
    if grad_scaler is not None and part.grad_scaler is not None:
        part.grad_scaler.load_state_dict(dict(grad_scaler))


def _set_shard(part: Any, param: torch.nn.Parameter, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy this rank's shard of a parameter into the distributed optimizer."""
    if param not in part.model_param_group_index_map:
        return
    place = part._get_model_param_range_map(param)["param"]
    shard = {name: value.flatten()[place.start : place.end] for name, value in tensors.items()}
    with keeping_steps(part):
        part._set_main_param_and_optimizer_states(param, shard)


@contextmanager
def keeping_steps(part: Any) -> Iterator[None]:
    """Load tensors into ``part`` without their step inside the context; the step is set separately."""
    set_states = part._set_main_param_and_optimizer_states

    def set_states_but_step(model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        kept = {"step": state["step"]} if isinstance(state.get("step"), torch.Tensor) else {}
        set_states(model_param, tensors | kept)

    part._set_main_param_and_optimizer_states = set_states_but_step
    try:
        yield
    finally:
        del part._set_main_param_and_optimizer_states
