"""Products of v with every sample's gradient, from one backward pass over whole microbatches.

Every layer with parameters is linear in them: y = A(x) W, for a matrix product, an embedding and a norm alike. When W
moves along V, the outputs move by A(x) V, which is what the layer computes with V in the place of W. So with g_i, the
gradient of the loss with respect to the outputs of sample i,

    ⟨V, ∇_W l_i⟩ = ⟨g_i, A(x_i) V⟩,

one product more for each layer, where the gradient of the parameters is one less. The samples of a microbatch stay
apart because each has outputs of its own.

Shape legend: n samples of this replica, b samples of a microbatch, s sequence length (or this rank's part of it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import linear_with_frozen_weight

from megatron_dwm.model.attributes import changed_attributes
from megatron_dwm.model.protocols import ModelChunk
from megatron_dwm.runtime.process_groups import ParallelState

_LINEAR = (ColumnParallelLinear, RowParallelLinear)
_EMBEDDINGS = (VocabParallelEmbedding, torch.nn.Embedding)
_NORMS = (torch.nn.LayerNorm, torch.nn.RMSNorm)
_CHANGE_AT_A_TIME = {"cpu": 1 << 22, "gpu": 1 << 27}
"""Numbers of a layer's outputs whose change is computed at a time: enough for a matrix product to be worth it."""
_PRODUCTS_AT_A_TIME = {"cpu": 1 << 19, "gpu": 1 << 24}
"""Numbers that are multiplied at a time, in float32: few enough for a CPU's cache, or to use a GPU well."""


def has_known_layers(chunks: Sequence[ModelChunk]) -> bool:
    """Whether each parameter belongs to a layer that is known here; Transformer Engine's and Apex's are not."""
    return all(
        isinstance(module, (*_LINEAR, *_EMBEDDINGS, *_NORMS)) or next(module.parameters(recurse=False), None) is None
        for chunk in chunks
        for module in chunk.modules()
    )


@contextmanager
def sample_products(
    direction: Mapping[torch.nn.Parameter, torch.Tensor],
    chunks: Sequence[ModelChunk],
    num_samples: int,
    micro_batch_size: int,
    parallel_state: ParallelState,
) -> Iterator[torch.Tensor]:
    """Let backward passes add the products of v with the samples' gradients to the yielded tensor [n], float64.

    While open, no gradients of parameters are formed. The k-th call of a layer that is differentiated belongs to the
    k-th microbatch of its model chunk in all of megatron-core's schedules, also where activations are recomputed. The
    sum is this rank's part of the replica's.

    Args:
        direction: v, by parameter.
        chunks: model chunks that :func:`has_known_layers` accepts.
        num_samples: n.
        micro_batch_size: b.
        parallel_state: the layout.
    """
    params = [param for chunk in chunks for param in chunk.parameters() if param.requires_grad]
    products = torch.zeros(num_samples, dtype=torch.float64, device=params[0].device)
    modules = [(name, module) for chunk in chunks for name, module in chunk.named_modules()]
    layers = [
        _Layer(name, module, direction, products, micro_batch_size, parallel_state)
        for name, module in modules
        if isinstance(module, (*_LINEAR, *_EMBEDDINGS, *_NORMS))
    ]
    with ExitStack() as stack:
        for param in params:
            param.requires_grad_(False)
            stack.callback(param.requires_grad_, True)
        for layer in layers:
            handle = layer.module.register_forward_hook(layer.watch, with_kwargs=True)
            stack.callback(handle.remove)
            if isinstance(layer.module, _LINEAR):
                stack.enter_context(changed_attributes(layer.module, {"_forward_impl": linear_with_frozen_weight}))
        yield products


class _Layer:
    """One layer, and how many of its microbatches have been differentiated."""

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        direction: Mapping[torch.nn.Parameter, torch.Tensor],
        products: torch.Tensor,
        micro_batch_size: int,
        parallel_state: ParallelState,
    ) -> None:
        self.module, self.direction, self.products, self.micro_batch_size = (
            module,
            direction,
            products,
            micro_batch_size,
        )
        self.bare = _WithoutHooks(module)
        self.batch_dim = 1
        if isinstance(module, _EMBEDDINGS):
            self.batch_dim = 1 if getattr(module, "reduce_scatter_embeddings", False) else 0
        self.counts = parallel_state.tp_rank == 0 or not _is_replicated(name, module)
        self.is_local = not isinstance(module, (RowParallelLinear, VocabParallelEmbedding))
        """Whether it computes what its parameters contribute without the other ranks of its TP group."""
        self.takes_parts = isinstance(module, ColumnParallelLinear) and not module.sequence_parallel
        """Whether a part of its inputs gives that part of its outputs."""
        self.microbatches = 0

    def watch(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Take note of a forward pass: the product follows when the gradient of its outputs is known."""
        if not torch.is_grad_enabled():  # an evaluation, or the first pass of a layer that is recomputed
            return None
        outputs = output[0] if isinstance(output, tuple) else output
        if not outputs.requires_grad:  # an embedding's, as its parameters are frozen
            outputs = outputs.detach().requires_grad_()
        first = self.microbatches * self.micro_batch_size
        self.microbatches += 1
        inputs = tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in args)

        if self.counts or not self.is_local:
            outputs.register_hook(partial(self._add_products, first, inputs, kwargs))
        return (outputs, *output[1:]) if isinstance(output, tuple) else outputs

    def _add_products(
        self, first: int, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], gradient: torch.Tensor
    ) -> None:
        """Add the products of one microbatch, whose first sample is ``first``, part by part.

        The outputs of a large vocabulary would otherwise need room several times over.
        """
        size = _rows(gradient, _CHANGE_AT_A_TIME)
        whole = None if self.takes_parts and inputs else self._change(inputs, kwargs)
        for start in range(0, len(gradient), size):
            part = slice(start, start + size)
            change = whole[part] if whole is not None else self._change((inputs[0][part], *inputs[1:]), kwargs)
            if self.counts:
                samples = part if self.batch_dim == 0 else slice(0, gradient.shape[1])
                found = _inner_products(gradient[part], change, self.batch_dim)
                self.products[first : first + self.micro_batch_size][samples] += found

    @torch.no_grad()
    def _change(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Return by what the outputs move when the parameters move along v; the ranks of a TP group call it together.

        A layer may leave the adding of its bias to the next one; the gradient is that of the sum all the same.
        """
        tied = kwargs.get("weight")  # the output layer's, where it is the embedding's
        if tied is not None:
            kwargs = {**kwargs, "weight": self._along(tied)}
        params = {f"layer.{name}": self._along(param) for name, param in self.module.named_parameters(recurse=False)}
        output: Any = torch.func.functional_call(self.bare, params, inputs, dict(kwargs))
        change, bias = output if isinstance(output, tuple) else (output, None)
        moved: torch.Tensor = change if bias is None else change + bias
        return moved

    def _along(self, param: Any) -> torch.Tensor:
        return self.direction[param].to(param.dtype)


class _WithoutHooks(torch.nn.Module):
    """A layer's computation alone."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.forward(*args, **kwargs)


def _rows(values: torch.Tensor, at_a_time: Mapping[str, int]) -> int:
    """Return how many rows of a tensor, along its first dimension, hold so many numbers; at least one."""
    limit = at_a_time["cpu" if values.is_cpu else "gpu"]
    return max(1, limit * len(values) // max(1, values.numel()))


def _inner_products(one: torch.Tensor, other: torch.Tensor, batch_dim: int) -> torch.Tensor:
    """Return the inner product of each sample's part of two tensors [b], float64."""
    wide, size = torch.promote_types(one.dtype, torch.float32), _rows(one, _PRODUCTS_AT_A_TIME)
    pairs = zip(one.split(size), other.split(size), strict=True)
    by_row = torch.cat([(some.to(wide) * others.to(wide)).sum(-1) for some, others in pairs])
    summed = [dim for dim in range(by_row.dim()) if dim != batch_dim]
    return by_row.sum(summed, dtype=torch.float64)


def _is_replicated(name: str, module: torch.nn.Module) -> bool:
    """Whether all ranks of a TP group have the same outputs, so that one of them counts.

    Under sequence parallelism the outputs of most layers are parts of the sequence; those of norms of queries and keys
    are parts of the heads.
    """
    if isinstance(module, ColumnParallelLinear):
        return False
    if isinstance(module, RowParallelLinear):
        return not module.sequence_parallel
    if isinstance(module, VocabParallelEmbedding):
        return not module.reduce_scatter_embeddings
    if isinstance(module, torch.nn.Embedding):
        return True
    is_of_heads = "q_layernorm" in name or "k_layernorm" in name
    return not (is_of_heads or getattr(next(module.parameters()), "sequence_parallel", False))
