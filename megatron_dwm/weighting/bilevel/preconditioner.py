"""Adam's preconditioner P, applied to the target gradient: a_i = ⟨P v, ∇ l_i⟩.

A step of Adam moves θ by -η P m, with P = 1 / (sqrt(second moment, bias-corrected) + ε); through m it depends on this
step's gradient linearly. ⟨v, P ∇ l_i⟩ is therefore how much sample i's weight moves the target loss, to first order.
Elements whose second moment is zero have had no gradient yet, such as the embeddings of tokens that have not occurred
or, with dropout, parts of tokens that have occurred once. No sample's weight moves them: P is 0 there, and not 1 / ε.
For parameters with a separate learning rate (``--decoupled-lr``), P is scaled by that rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.errors import UserError
from megatron_dwm.model.optimizer_parts import optimizer_parts
from megatron_dwm.model.protocols import Optimizer
from megatron_dwm.runtime.device import current_device
from megatron_dwm.weighting.bilevel.alignment import Direction


@dataclass(frozen=True)
class _Shard:
    """The part of a parameter whose optimizer state this rank holds."""

    place: slice
    """The part's range in the flattened parameter."""
    state: dict[str, Any]
    group: dict[str, Any]
    base_rate: float
    """Learning rate that P is relative to."""

    @property
    def relative_rate(self) -> float:
        """The learning rate of the parameter's group, relative to the optimizer's."""
        return float(self.group["max_lr"] / self.base_rate) if self.base_rate else 1.0


def precondition(direction: Direction, optimizer: Optimizer) -> None:
    """Set v ← P v, in place; NaN before the optimizer's first step.

    Under the distributed optimizer each rank scales the part whose state it holds, and leaves the rest as it is.
    """
    parts = optimizer_parts(optimizer)
    shards = [pair for part in parts for pair in _shards(part, direction)]
    _scale([direction[param].view(-1)[shard.place] for param, shard in shards], [shard for _, shard in shards])


def _scale(values: Sequence[torch.Tensor], shards: Sequence[_Shard]) -> None:
    """Set v ← P v, in place, for the parts of v whose optimizer state is given."""
    known, parts = [], []
    for v, part in zip(values, shards, strict=True):
        if "exp_avg_sq" in part.state:
            known.append(v)
            parts.append(part)
        else:  # no step has been made yet, so P is unknown
            v.fill_(torch.nan)
    counts = _steps(parts)
    for group in batches([v.numel() for v in known]):
        # In a function, so that the memory of one group is free before the next.
        _scale_together([known[n] for n in group], [parts[n] for n in group], [counts[n] for n in group])


def _scale_together(values: list[torch.Tensor], parts: Sequence[_Shard], counts: Sequence[float]) -> None:
    """Set v ← P v, in place, with temporary memory of the size of the values.

    Args:
        counts: the optimizer's number of steps for each part.
    """
    corrections = [1 - part.group["betas"][1] ** count for part, count in zip(parts, counts, strict=True)]
    moments = [part.state["exp_avg_sq"].view(-1) for part in parts]
    scales = list(torch._foreach_div(moments, corrections))
    torch._foreach_sqrt_(scales)
    epsilons = [part.group["eps"] for part in parts]
    torch._foreach_add_(scales, epsilons)
    rates = [part.relative_rate for part in parts]
    if any(rate != 1 for rate in rates):
        torch._foreach_mul_(values, rates)
    torch._foreach_div_(values, scales)
    torch._foreach_sub_(scales, epsilons)
    torch._foreach_sign_(scales)  # 0 where there has been no gradient, 1 elsewhere; without memory of that size
    torch._foreach_mul_(values, scales)


def _steps(parts: Sequence[_Shard]) -> list[float]:
    """Return the optimizer's number of steps for each part; those on a device are read together."""
    steps = [part.state["step"] if "step" in part.state else part.group["step"] for part in parts]
    tensors = [step for step in steps if isinstance(step, torch.Tensor)]
    read = iter(torch.stack([step.reshape(()) for step in tensors]).tolist() if tensors else [])
    return [next(read) if isinstance(step, torch.Tensor) else float(step) for step in steps]


def batches(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Yield groups of parts, by index, that are scaled together.

    Scaling takes memory for the elements of a group, so that none is larger than the largest part.
    """
    batch: list[int] = []
    limit, total = max(sizes, default=0), 0
    for place, size in enumerate(sizes):
        if batch and total + size > limit:
            yield batch
            batch, total = [], 0
        batch.append(place)
        total += size
    if batch:
        yield batch


def precondition_by_torch(direction: Direction, optimizer: torch.optim.Optimizer) -> None:
    """Set v ← P v, in place, with torch's Adam or AdamW; 0 for parameters that it has never updated.

    Raises:
        UserError: the optimizer keeps no second moments.
    """
    base_rate = max(float(group["lr"]) for group in optimizer.param_groups)
    held = {
        param: _Shard(slice(None), optimizer.state[param], {**group, "max_lr": float(group["lr"])}, base_rate)
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
        _scale([v.view(-1)], [held[param]])


def is_preconditioner_known(optimizer: Optimizer) -> bool:
    """Return whether P is known: the optimizer has made a step, or loaded its state; a collective call of all ranks."""
    parts = optimizer_parts(optimizer)
    known = any("exp_avg_sq" in state for part in parts for state in part.optimizer.state.values())
    anywhere = torch.tensor(float(known), device=current_device())
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)  # a shard of the distributed optimizer may be empty
    return bool(anywhere)


def _shards(part: Any, direction: Direction) -> Iterator[tuple[torch.nn.Parameter, _Shard]]:
    """Yield each parameter of which ``part`` of the optimizer holds a shard on this rank, with that shard."""
    groups, states, base_rate = part.optimizer.param_groups, part.optimizer.state, part.config.lr
    if hasattr(part, "model_param_group_index_map"):
        for param, (group_index, order) in part.model_param_group_index_map.items():
            place = part._get_model_param_range_map(param)["param"]
            group = groups[group_index]
            state = states.get(group["params"][order], {})
            yield param, _Shard(slice(place.start, place.end), state, group, base_rate)
        return
    group_of = {main: group for group in groups for main in group["params"]}
    for param in direction:
        main = getattr(param, "main_param", None)
        main = param if main is None else main
        if main in group_of:
            yield param, _Shard(slice(None), states.get(main, {}), group_of[main], base_rate)
