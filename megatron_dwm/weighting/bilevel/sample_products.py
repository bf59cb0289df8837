"""Products of v with every sample's gradient, from one backward pass over whole microbatches.

Every layer with parameters is linear in them: y = A(x) W, for a matrix product, an embedding or a norm. When W
moves along V, the outputs move by A(x) V, which is what the layer computes with V in place of W. With g_i, the
gradient of the loss with respect to the outputs of sample i,

    ⟨V, ∇_W l_i⟩ = ⟨g_i, A(x_i) V⟩,

which is one more product per layer, while the product for the parameters' gradient is saved. The samples of a
microbatch stay separate because each has its own outputs.

Shape legend: n samples of this replica, b samples of a microbatch, s sequence length (or this rank's part of it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import linear_with_frozen_weight
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_dwm.model.attributes import temporary_attributes
from megatron_dwm.model.protocols import ModelChunk
from megatron_dwm.runtime.process_groups import ParallelState

_LINEAR = (ColumnParallelLinear, RowParallelLinear)
_EMBEDDINGS = (VocabParallelEmbedding, torch.nn.Embedding)
_NORMS = (torch.nn.LayerNorm, torch.nn.RMSNorm)
_CHUNK_ELEMENTS = {"cpu": 1 << 19, "gpu": 1 << 24}
"""Numbers that are multiplied at a time, in float32: few enough for a CPU's cache, or to use a GPU well."""


def has_supported_layers(chunks: Sequence[ModelChunk]) -> bool:
    """Return whether each parameter is in a supported kind of layer; those of Transformer Engine and Apex are not."""
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
    """Make backward passes add the products of v with the samples' gradients to the yielded tensor [n], float64.

    While open, no gradients of parameters are computed. The k-th differentiated call of a layer belongs to the
    k-th microbatch of its model chunk in all of megatron-core's schedules, also with recomputed activations. The
    sum is this rank's part of the replica's.

    Args:
        direction: v, by parameter.
        chunks: model chunks that :func:`has_supported_layers` accepts.
        num_samples: n.
        micro_batch_size: b.
        parallel_state: the layout.
    """
    params = [param for chunk in chunks for param in chunk.parameters() if param.requires_grad]
    products = torch.zeros(num_samples, dtype=torch.float64, device=params[0].device)
    by_microbatch = products.split(micro_batch_size)
    modules = [(name, module) for chunk in chunks for name, module in chunk.named_modules()]
    layers = [
        _Layer(name, module, direction, by_microbatch, parallel_state)
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
                stack.enter_context(temporary_attributes(layer.module, {"_forward_impl": linear_with_frozen_weight}))
        yield products


class _Layer:
    """One layer, and how many of its microbatches have been differentiated.

    The functions that are called for every microbatch make few calls of torch: with small microbatches a CPU spends
    more time on calling than on computing.
    """

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        direction: Mapping[torch.nn.Parameter, torch.Tensor],
        products: Sequence[torch.Tensor],
        parallel_state: ParallelState,
    ) -> None:
        """
        Args:
            products: where the products of each microbatch are added [b].
        """
        self.module, self.direction, self.products = module, direction, products
        self.params: Mapping[str, torch.nn.Parameter | None] = vars(module)["_parameters"]
        """The layer's parameters; None for a missing one."""
        self.batch_dim = 1
        if isinstance(module, _EMBEDDINGS):
            self.batch_dim = 1 if getattr(module, "reduce_scatter_embeddings", False) else 0
        self.is_counted = parallel_state.tp_rank == 0 or not _is_replicated(name, module)
        self.is_local = not isinstance(module, (RowParallelLinear, VocabParallelEmbedding))
        """Whether the layer computes its parameters' contribution without the other ranks of its TP group."""
        self.has_whole_outputs = (
            isinstance(module, _LINEAR)
            if parallel_state.tp_size == 1
            else (isinstance(module, ColumnParallelLinear) and not module.gather_output)
        )
        """Whether it is a linear layer in which a single rank computes each output."""
        self.microbatches = 0

    def watch(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Register a forward pass: the product is formed when the gradient of its outputs is known."""
        if not torch.is_grad_enabled():  # an evaluation, or the first pass of a layer that is recomputed
            return None
        outputs = output[0] if isinstance(output, tuple) else output
        if not outputs.requires_grad:  # those of an embedding, because its parameters are frozen
            outputs = outputs.detach().requires_grad_()
        microbatch = self.microbatches
        self.microbatches += 1
        if self.is_counted or not self.is_local:
            inputs = tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in args)
            # A hook lives as long as the graph, which the schedule holds until the next forward pass is made. The
            # inputs are freed as soon as the product is formed, as a layer's own saved tensors are.
            saved = [inputs]
            outputs.register_hook(lambda gradient: self._add_products(microbatch, saved.pop(), kwargs, gradient))
        return (outputs, *output[1:]) if isinstance(output, tuple) else outputs

    def _add_products(
        self, microbatch: int, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], gradient: torch.Tensor
    ) -> None:
        """Add the products of one microbatch. Operations in a backward pass are not recorded."""
        if self.has_whole_outputs and inputs:
            found = self._products_of_linear(inputs[0], gradient, kwargs.get("weight"))
        else:
            found = _inner_products(gradient, self._change(inputs, kwargs), self.batch_dim)
        if self.is_counted:
            self.products[microbatch].add_(found)

    def _products_of_linear(
        self, inputs: torch.Tensor, gradient: torch.Tensor, weight: torch.nn.Parameter | None
    ) -> torch.Tensor:
        """Return ⟨g_i, x_i Vᵀ⟩ = ⟨g_i V, x_i⟩ [b], in the form with fewer elementwise products.

        With a large vocabulary this avoids another tensor of the size of the logits.

        Args:
            weight: passed to the layer, if it has no weight itself.
        """
        if getattr(self.module, "sequence_parallel", False) and isinstance(self.module, ColumnParallelLinear):
            inputs = gather_from_sequence_parallel_region(inputs, False)
        along = self._along(self.params["weight"] if weight is None else weight)
        outputs, width = along.shape
        # In fp16 gradients carry the loss scale, so that their product with V might overflow.
        if width < outputs and gradient.dtype != torch.float16:
            found = _inner_products(gradient @ along, inputs, batch_dim=1)
        else:
            found = _inner_products(gradient, torch.nn.functional.linear(inputs, along), batch_dim=1)
        bias = self.params.get("bias")
        if bias is None:
            return found
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return found + gradient.sum(0, dtype=wide).double() @ self.direction[bias].double()

    def _change(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Return the change of the outputs when the parameters move along v; a collective call of the TP group.

        A layer may leave adding its bias to the next layer; the gradient is still that of the sum.
        """
        tied = kwargs.get("weight")  # of the output layer, if it is tied to the embedding
        if tied is not None:
            kwargs = {**kwargs, "weight": self._along(tied)}
        along = {name: None if param is None else self._along(param) for name, param in self.params.items()}
        # Like torch.func.functional_call, but without hooks.
        with temporary_attributes(self.module, {"_parameters": along}):
            output: Any = self.module.forward(*inputs, **kwargs)
        change, bias = output if isinstance(output, tuple) else (output, None)
        moved: torch.Tensor = change if bias is None else change + bias
        return moved

    def _along(self, param: Any) -> torch.Tensor:
        along, dtype = self.direction[param], param.dtype
        return along if along.dtype == dtype else along.to(dtype)


def _inner_products(one: torch.Tensor, other: torch.Tensor, batch_dim: int) -> torch.Tensor:
    """Return the inner product of each sample's part of two tensors [b], float64."""
    limit, numbers = _CHUNK_ELEMENTS["cpu" if one.is_cpu else "gpu"], one.numel()
    if numbers <= limit:
        by_row = _products_of_rows(one, other)
    else:
        size = max(1, limit * len(one) // numbers)
        pairs = zip(one.split(size), other.split(size), strict=True)
        by_row = torch.cat([_products_of_rows(some, others) for some, others in pairs])
    summed = [dim for dim in range(by_row.dim()) if dim != batch_dim]
    return by_row.sum(summed, dtype=torch.float64)


def _products_of_rows(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the inner products over the last dimension, float32 or wider.

    The products of bf16 numbers are rounded to bf16 before they are summed, which adds an error as small as that of the
    numbers themselves. Widening the numbers first would take three times as long.
    """
    if one.dtype == other.dtype == torch.bfloat16:
        return (one * other).sum(-1, dtype=torch.float32)
    if one.dtype != torch.float32 or other.dtype != torch.float32:
        wide = torch.promote_types(one.dtype, torch.float32)
        one, other = one.to(wide), other.to(wide)
    return (one * other).sum(-1)


def _is_replicated(name: str, module: torch.nn.Module) -> bool:
    """Return whether all ranks of a TP group have the same outputs, so that only one of them counts.

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
