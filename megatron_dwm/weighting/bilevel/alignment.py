"""Alignment of samples with the target: a_i = ⟨v, ∇ l_i(θ)⟩ (docs/method.md).

Exact: one backward pass over microbatches of one sample. A hook on every parameter receives that sample's gradient just
before data parallelism reduces it, and adds its product with v. Finite difference: two forward passes at θ ± εv.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.model.attributes import temporary_attributes
from megatron_dwm.model.protocols import ModelChunk
from megatron_dwm.runtime.process_groups import ParallelState

Direction = dict[torch.nn.Parameter, torch.Tensor]
"""v, by parameter: the shape of the parameter, float32 (float64 for float64 models)."""


def is_counted_here(name: str, param: torch.nn.Parameter, parallel_state: ParallelState) -> bool:
    """Return whether this rank's product for the parameter is included in the sum over the replica.

    A parameter that is replicated over the TP ranks has the same gradient on all of them, and counts once. If its
    gradients are parts of a sum, all ranks count: norms and biases under sequence parallelism, and norms of queries and
    keys, whose heads are split over the ranks. Tied embeddings on two pipeline stages each hold a part. On every
    context-parallel rank, a parameter's gradient is the part from that rank's tokens, so all of these ranks count.
    """
    is_sharded = getattr(param, "tensor_model_parallel", False)
    is_of_heads = "q_layernorm" in name or "k_layernorm" in name  # megatron-core identifies them by name, too
    is_partial = getattr(param, "sequence_parallel", False) or is_of_heads
    return is_sharded or is_partial or parallel_state.tp_rank == 0


@contextmanager
def single_sample_products(
    direction: Direction, chunks: Sequence[ModelChunk], num_samples: int, parallel_state: ParallelState
) -> Iterator[torch.Tensor]:
    """Make backward passes of single-sample microbatches add ⟨v, gradient⟩ to the yielded tensor [n], float64.

    The k-th gradient a parameter receives belongs to the k-th microbatch of its model chunk in all of megatron-core's
    schedules. The sum is this rank's part of the replica's.
    """
    device = next(chunks[0].parameters()).device
    products = torch.zeros(num_samples, dtype=torch.float64, device=device)
    seen: dict[Any, int] = {}

    def add_product(is_counted: bool, param: Any) -> None:
        sample = seen.get(param, 0)
        seen[param] = sample + 1
        if is_counted:
            products[sample] += inner_product(param.grad, direction[param])
        # The sum of these gradients is not needed, and DDP must not accumulate it in its buffers, which may hold v.
        param.grad_added_to_main_grad = True

    handles = [
        param.register_post_accumulate_grad_hook(partial(add_product, is_counted_here(name, param, parallel_state)))
        for chunk in chunks
        for name, param in chunk.named_parameters()
        if param.requires_grad
    ]
    tied = [p for chunk in chunks for p in chunk.parameters() if getattr(p, "zero_out_wgrad", False)]
    try:
        with ExitStack() as stack:
            for param in tied:  # which DDP would accumulate nevertheless
                stack.enter_context(temporary_attributes(param, {"zero_out_wgrad": False}))
            yield products
    finally:
        for handle in handles:
            handle.remove()
        for param in seen:
            param.grad_added_to_main_grad = False


def inner_product(gradient: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return ⟨gradient, v⟩, float64.

    torch's dot product is several times faster than multiplying and summing, but on a CPU it sums sequentially, and its
    rounding error grows with the length. Long tensors are therefore split into parts, which are summed in float64.
    """
    size = 1 << (16 if gradient.is_cpu else 24)  # a GPU sums in a tree, and needs few and long parts
    pairs = zip(torch.split(gradient.reshape(-1), size), torch.split(v.reshape(-1), size), strict=True)
    return torch.stack([torch.dot(g.to(w.dtype), w) for g, w in pairs]).sum(dtype=torch.float64)


def is_counting_rank(param: torch.nn.Parameter, parallel_state: ParallelState) -> bool:
    """Return whether this is the one rank, of the model-parallel ranks with the same parameter, that counts it."""
    is_sharded = getattr(param, "tensor_model_parallel", False)
    # megatron-core marks the last stage's copy of a tied embedding, which has the first stage's v.
    return (is_sharded or parallel_state.tp_rank == 0) and not getattr(param, "shared", False)


def global_norm(direction: Direction, parallel_state: ParallelState) -> float:
    """Return the norm of v over the whole model, each parameter counted once."""
    device = next(iter(direction)).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for param, v in direction.items():
        if is_counting_rank(param, parallel_state):
            total += v.double().square().sum()
    dist.all_reduce(total, group=parallel_state.mp_group)
    return float(total.sqrt())


def shift(direction: Direction, distance: float) -> None:
    """Move θ by distance · v, in place."""
    with torch.no_grad():
        for param, v in direction.items():
            param.data.add_(v.to(param.dtype), alpha=distance)
