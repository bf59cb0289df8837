"""Adam's preconditioner P, applied to the target gradient: a_i = ⟨P v, ∇ l_i⟩.

A step of Adam moves θ by -η P m, with P = 1 / (sqrt(second moment, bias-corrected) + ε); through m it depends on this
step's gradient linearly. ⟨v, P ∇ l_i⟩ is therefore how much sample i's weight moves the target loss, to first order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.runtime.distributed import Layout
from megatron_dwm.weighting.alignment import Direction


def precondition(direction: Direction, optimizer: Any, layout: Layout) -> None:
    """v ← P v, in place.

    Under the distributed optimiser each data-parallel rank scales the part whose state it holds; the parts are summed.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        sharded = isinstance(part, DistributedOptimizer)
        for param, owned, state, group in _states(part, direction):
            flat = direction[param].view(-1)
            if state is None:
                flat.zero_()
                continue
            step = state.get("step", group.get("step"))
            corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(step))
            scaled = flat[owned] / (corrected.sqrt().view(-1) + group["eps"])
            if sharded:
                flat.zero_()
            flat[owned] = scaled.to(flat)
        if sharded:
            for v in direction.values():
                dist.all_reduce(v, group=layout.dp_group)


def _states(part: Any, direction: Direction) -> Iterator[tuple[torch.nn.Parameter, slice, Any, dict[str, Any]]]:
    """``(parameter, owned part of it, optimiser state or None, parameter group)`` of every parameter."""
    groups = part.optimizer.param_groups
    states = part.optimizer.state
    if hasattr(part, "model_param_group_index_map"):
        for param in direction:
            if param not in part.model_param_group_index_map:
                yield param, slice(0, 0), None, {}
                continue
            group_index, order = part.model_param_group_index_map[param]
            owned = part._get_model_param_range_map(param)["param"]
            group = groups[group_index]
            yield param, slice(owned.start, owned.end), states[group["params"][order]], group
        return
    group_of = {main: group for group in groups for main in group["params"]}
    for param in direction:
        main = getattr(param, "main_param", None)
        main = param if main is None else main
        yield param, slice(None), states[main], group_of[main]
