"""Adam's preconditioner P, applied to the target gradient: a_i = ⟨P v, ∇ l_i⟩.

A step of Adam moves θ by -η P m, with P = 1 / (sqrt(second moment, bias-corrected) + ε); through m it depends on this
step's gradient linearly. ⟨v, P ∇ l_i⟩ is therefore how much sample i's weight moves the target loss, to first order.
Parameters that learn at a rate of their own (``--decoupled-lr``) have P scaled by that rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.errors import UserError
from megatron_dwm.model.optimizer_parts import optimizer_parts
from megatron_dwm.model.protocols import Optimizer
from megatron_dwm.runtime.device import current_device
from megatron_dwm.runtime.process_groups import ParallelState
from megatron_dwm.weighting.bilevel.alignment import Direction


@dataclass(frozen=True)
class _Owned:
    """The part of a parameter whose optimizer state this rank holds."""

    place: slice
    """Of the flattened parameter."""
    state: dict[str, Any]
    group: dict[str, Any]
    base_rate: float
    """Learning rate that P is relative to."""

    def preconditioned(self, v: torch.Tensor) -> torch.Tensor:
        """``v`` is flat and of this part."""
        if "exp_avg_sq" not in self.state:  # no step has been made yet: P is unknown, and so is what follows from it
            return torch.full_like(v, torch.nan)
        step = float(self.state["step"] if "step" in self.state else self.group["step"])
        second_moment = self.state["exp_avg_sq"].view(-1) / (1 - self.group["betas"][1] ** step)
        relative_rate = self.group["max_lr"] / self.base_rate if self.base_rate else 1.0
        # In place: a large parameter must not need more room here than in the optimizer's step.
        return (relative_rate * v).div_(second_moment.sqrt_().add_(self.group["eps"]))


def precondition(direction: Direction, optimizer: Optimizer, parallel_state: ParallelState) -> None:
    """v ← P v, in place; NaN before the optimizer's first step.

    Under the distributed optimizer each of the ranks that its state is sharded over scales the part that it holds; the
    parts are summed.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    parts = optimizer_parts(optimizer)
    owned = {param: held for part in parts for param, held in _owned(part, direction)}
    sharded = any(isinstance(part, DistributedOptimizer) for part in parts)
    for param, v in direction.items():
        flat = v.view(-1)
        place, scaled = slice(0, 0), flat[:0]
        if param in owned:
            place = owned[param].place
            scaled = owned[param].preconditioned(flat[place])
        if sharded:
            v.zero_()
        flat[place] = scaled.to(flat)
        if sharded:
            dist.all_reduce(v, group=parallel_state.optimizer_group)


def precondition_by_torch(direction: Direction, optimizer: torch.optim.Optimizer) -> None:
    """v ← P v, in place, with torch's own Adam or AdamW; parameters that it has never moved have 0.

    Raises:
        UserError: the optimizer keeps no second moments.
    """
    base_rate = max(float(group["lr"]) for group in optimizer.param_groups)
    held = {
        param: _Owned(slice(None), optimizer.state[param], {**group, "max_lr": float(group["lr"])}, base_rate)
        for group in optimizer.param_groups
        for param in group["params"]
        if optimizer.state.get(param)
    }
    for param, v in direction.items():
        if param not in held:
            v.zero_()
            continue
        if "exp_avg_sq" not in held[param].state:
            raise UserError(
                f"dwm_preconditioner adam: {type(optimizer).__name__} keeps no second moments; give "
                "WeightingConfig(dwm_preconditioner='none')"
            )
        v.view(-1).copy_(held[param].preconditioned(v.view(-1)))


def knows_preconditioner(optimizer: Optimizer) -> bool:
    """Whether P is known: the optimizer has made a step, or its state was loaded. A collective call of all ranks."""
    parts = optimizer_parts(optimizer)
    known = any("exp_avg_sq" in state for part in parts for state in part.optimizer.state.values())
    anywhere = torch.tensor(float(known), device=current_device())
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)  # a shard of the distributed optimizer may be empty
    return bool(anywhere)


def _owned(part: Any, direction: Direction) -> Iterator[tuple[torch.nn.Parameter, _Owned]]:
    """What ``part`` of the optimizer holds on this rank, by parameter."""
    groups, states, base_rate = part.optimizer.param_groups, part.optimizer.state, part.config.lr
    if hasattr(part, "model_param_group_index_map"):
        for param, (group_index, order) in part.model_param_group_index_map.items():
            place = part._get_model_param_range_map(param)["param"]
            group = groups[group_index]
            state = states.get(group["params"][order], {})
            yield param, _Owned(slice(place.start, place.end), state, group, base_rate)
        return
    group_of = {main: group for group in groups for main in group["params"]}
    for param in direction:
        main = getattr(param, "main_param", None)
        main = param if main is None else main
        if main in group_of:
            yield param, _Owned(slice(None), states.get(main, {}), group_of[main], base_rate)
