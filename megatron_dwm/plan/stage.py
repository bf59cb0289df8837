"""Memory and traffic of one pipeline stage: it is built as in a run, and one microbatch passes through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.parallel_state import get_global_memory_buffer

from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.model.attributes import temporary_attributes
from megatron_dwm.model.buckets import buckets_of, shard_of
from megatron_dwm.model.optimizer_parts import optimizer_parts
from megatron_dwm.model.protocols import ModelChunk, Optimizer
from megatron_dwm.plan.meter import Meter, Traffic, storage_key
from megatron_dwm.runtime.process_groups import ParallelState
from megatron_dwm.training.optimizer import allocate_state
from megatron_dwm.training.setup import LanguageModel
from megatron_dwm.weighting.bilevel.alignment import Direction, single_sample_products
from megatron_dwm.weighting.bilevel.gradient_buffers import GradientBuffers
from megatron_dwm.weighting.bilevel.preconditioner import batches
from megatron_dwm.weighting.bilevel.sample_products import sample_products

RULES_OF_FORWARD_PASSES = ("loss", "linupper", "similarity")
"""Rules that make one more forward pass over each batch."""


@dataclass(frozen=True)
class Pass:
    """A forward and a backward pass of one microbatch through a model chunk."""

    kept: float
    """Bytes that the forward pass leaves for the backward pass."""
    peak: float
    """Most bytes that the two passes hold."""
    traffic: Traffic


@dataclass(frozen=True)
class Stage:
    """One pipeline stage on one rank."""

    number: int
    layers: int
    parameters: int
    model_parameters: int
    """Parameters of the stage on all tensor-parallel ranks, each once."""
    weights: int
    """Bytes of the parameters, in the precision that the model computes in."""
    gradients: int
    """Bytes of the gradient buffers."""
    optimizer: int
    """Bytes of the optimizer's state, including its copies of the parameters."""
    parameter_copy: int
    """Bytes of this rank's copy of the parameters, to which an outer update returns."""
    gradient_mean: int
    """Bytes of this rank's part of the running mean of the target gradient."""
    direction: int
    """Bytes of the target gradient, in addition to the gradient buffers."""
    preconditioner: int
    """Bytes that are needed to precondition it."""
    workspace: int
    """Bytes of megatron-core's buffer for gathered activations, which is allocated once and kept."""
    training: tuple[Pass, ...]
    """The training pass, for each model chunk."""
    alignment: tuple[Pass, ...]
    """The alignment pass or a rule's forward pass, for each model chunk; empty if there is neither."""
    gradient_sync: Traffic
    """Gradients, after the backward passes of a step."""
    parameter_gather: Traffic
    """Parameters, after the optimizer's step."""
    direction_gather: Traffic
    """The target gradient, once each rank has preconditioned its part."""
    stage_traffic: Traffic
    """What one microbatch sends to the neighboring stages."""
    forward_traffic: Traffic
    """The part of it that the forward pass sends."""


def measure_stage(model: LanguageModel, weighting: WeightingConfig, micro_batch_size: int) -> Stage:
    """Measure the stage of the current rank, which has just been built."""
    chunks, optimizer = model.engine.chunks, model.components.optimizer
    core_config, layout = model.engine.config, model.parallel_state
    measure = partial(_measure, model, micro_batch_size)
    measure_chunks = partial(_measure_chunks, model, measure)
    allocate_state(optimizer)
    params = [param for chunk in chunks for param in chunk.parameters()]
    weights = _storages(params)
    states = [value for part in optimizer_parts(optimizer) for value in _state_tensors(part.optimizer)]
    optimizer_bytes = sum(size for key, size in _storages(states).items() if key not in weights)
    with model.engine.full_parameters():
        for chunk in chunks:  # the first pass makes buffers that later ones use again
            with _shortened(_decoder(chunk), core_config.recompute_num_layers or 1):
                measure(chunk, _plain)
        training = tuple(measure_chunks(_plain))
        alignment: tuple[Pass, ...] = ()
        direction_gather = Traffic()
        if weighting.dwm_rule in RULES_OF_FORWARD_PASSES:
            alignment = tuple(measure_chunks(_forward(model)))
        elif weighting.needs_alignments:
            direction_gather = _traffic_of(GradientBuffers(chunks).gather_shards)
            direction = {param: torch.empty(param.shape, dtype=torch.float32) for param in params}
            alignment = tuple(measure_chunks(_alignment(weighting.dwm_alignment, model, direction)))
        gradient_sync = _traffic_of(partial(finalize_model_grads, chunks, None))
    gather, is_sharded = Traffic(), chunks[0].ddp_config.use_distributed_optimizer
    if is_sharded:
        gather = _traffic_of(partial(_gather_parameters, chunks))
    return Stage(
        number=layout.pp_rank,
        layers=sum(len(_decoder(chunk).layers) for chunk in chunks),
        parameters=sum(param.numel() for param in params),
        model_parameters=sum(_times_held(param, layout) * param.numel() for param in params),
        weights=sum(weights.values()),
        gradients=sum(_gradient_buffers(chunks).values()),
        optimizer=optimizer_bytes,
        parameter_copy=sum(weights.values()) // (dist.get_world_size(layout.optimizer_group) if is_sharded else 1),
        gradient_mean=sum(4 * shard_of(bucket.grad_data, group).numel() for group, bucket in buckets_of(chunks)),
        direction=sum(4 * buffer.numel() for buffer in _narrow_gradients(chunks)),
        preconditioner=_preconditioner_bytes(optimizer),
        workspace=sum(_storages(get_global_memory_buffer().buffer.values()).values()),
        training=training,
        alignment=alignment,
        gradient_sync=gradient_sync,
        parameter_gather=gather,
        direction_gather=direction_gather,
        stage_traffic=_stage_traffic(model, micro_batch_size, has_backward=True),
        forward_traffic=_stage_traffic(model, micro_batch_size, has_backward=False),
    )


_Run = Callable[[ModelChunk, int], tuple[AbstractContextManager[Any], int, bool]]
"""Returns, for a chunk and the samples of a microbatch: the context of its passes, the samples that they really have,
and whether they end with a backward pass."""


def _plain(chunk: ModelChunk, samples: int) -> tuple[AbstractContextManager[Any], int, bool]:
    return chunk.no_sync(), samples, True


def _forward(model: LanguageModel) -> _Run:
    def run(chunk: ModelChunk, samples: int) -> tuple[AbstractContextManager[Any], int, bool]:
        stack = ExitStack()
        stack.enter_context(model.engine.unsynchronized())
        stack.enter_context(torch.no_grad())
        return stack, samples, False

    return run


def _alignment(kind: str, model: LanguageModel, direction: Direction) -> _Run:
    """Return how the alignment passes of a kind of ``--dwm-alignment`` run."""
    state = model.parallel_state
    if kind == "finite-difference":
        return _forward(model)

    def run(chunk: ModelChunk, samples: int) -> tuple[AbstractContextManager[Any], int, bool]:
        stack = ExitStack()
        stack.enter_context(model.engine.unsynchronized())
        if kind == "single-sample":
            stack.enter_context(single_sample_products(direction, [chunk], 1, state))
            return stack, 1, True
        stack.enter_context(sample_products(direction, [chunk], samples, samples, state))
        return stack, samples, True

    return run


def _measure_chunks(model: LanguageModel, measure: Callable[[ModelChunk, _Run], Pass], run: _Run) -> Iterable[Pass]:
    """Yield the passes of each chunk; of many equal layers a few are measured, and the others extrapolated."""
    core_config = model.engine.config
    for chunk in model.engine.chunks:
        decoder = _decoder(chunk)
        layers, unit = len(decoder.layers), core_config.recompute_num_layers or 1
        few = 2 * unit
        if layers <= few or layers % unit or core_config.recompute_method == "block":
            yield measure(chunk, run)
            continue
        with _shortened(decoder, few):
            long = measure(chunk, run)
        with _shortened(decoder, unit):
            short = measure(chunk, run)
        more = (layers - few) / unit
        yield Pass(
            long.kept + more * (long.kept - short.kept),
            long.peak + more * (long.peak - short.peak),
            long.traffic + (long.traffic + short.traffic.times(-1)).times(more),
        )


def _measure(model: LanguageModel, micro_batch_size: int, chunk: ModelChunk, run: _Run) -> Pass:
    """Pass one microbatch through a chunk."""
    context, samples, has_backward = run(chunk, micro_batch_size)
    core, layout = model.engine.config, model.parallel_state
    length = model.engine.seq_length // layout.cp_size
    tokens = torch.zeros(samples, length, dtype=torch.int64)
    mask = torch.ones(samples, length)
    shape = (length // (layout.tp_size if core.sequence_parallel else 1), samples, core.hidden_size)
    bare = _decoder(chunk)
    with context, Meter() as meter:
        if not bare.pre_process:
            inputs = torch.empty(shape, dtype=core.pipeline_dtype, requires_grad=has_backward)
            _innermost(chunk).set_input_tensor(inputs)
        output = chunk(tokens, tokens, None, labels=tokens, loss_mask=mask)
        kept = meter.allocated
        if has_backward:
            if output.dim() == 2:  # token losses
                (output.float() * mask).sum().backward()
            else:
                output.backward(torch.empty_like(output))
        peak = meter.peak
    return Pass(kept, peak, meter.traffic)


def _shortened(decoder: Any, layers: int) -> AbstractContextManager[None]:
    few = min(layers, len(decoder.layers))
    return temporary_attributes(decoder, {"layers": decoder.layers[:few], "num_layers_per_pipeline_rank": few})


def _gather_parameters(chunks: Sequence[ModelChunk]) -> None:
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def _traffic_of(action: Callable[[], Any]) -> Traffic:
    meter = Meter()
    with meter:
        action()
    return meter.traffic


def _stage_traffic(model: LanguageModel, micro_batch_size: int, *, has_backward: bool) -> Traffic:
    """Return the traffic that each of the rank's chunks sends forward, and backward, for a microbatch."""
    traffic, num_chunks = Traffic(), len(model.engine.chunks)
    core, layout = model.engine.config, model.parallel_state
    tokens = model.engine.seq_length // layout.cp_size // (layout.tp_size if core.sequence_parallel else 1)
    tensor = float(tokens * micro_batch_size * core.hidden_size * core.pipeline_dtype.itemsize)
    sends = num_chunks - layout.is_last_pipeline_stage
    if has_backward:
        sends += num_chunks - (layout.pp_rank == 0)
    for _ in range(sends if layout.pp_size > 1 else 0):
        traffic.add("send", tensor, 2)
    return traffic


def _times_held(param: torch.nn.Parameter, layout: ParallelState) -> int:
    """Return the number of tensor-parallel ranks over which a parameter is split; 0 for a tied embedding's copy."""
    if getattr(param, "shared", False):
        return 0
    return layout.tp_size if getattr(param, "tensor_model_parallel", False) else 1


def _innermost(chunk: ModelChunk) -> Any:
    module = chunk.module
    while hasattr(module, "module"):
        module = module.module
    return module


def _decoder(chunk: ModelChunk) -> Any:
    return _innermost(chunk).decoder


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Return the bytes of the tensors' storages, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage_key(storage): storage.nbytes() for storage in storages}


def _gradient_buffers(chunks: Sequence[ModelChunk]) -> dict[int, int]:
    return _storages(buffer.grad_data for chunk in chunks for buffer in chunk.buffers)


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the tensors that an optimizer updates, and those of its state."""
    stepped = [param for group in optimizer.param_groups for param in group["params"]]
    kept = [value for state in optimizer.state.values() for value in state.values()]
    return [value for value in [*stepped, *kept] if isinstance(value, torch.Tensor)]


def _narrow_gradients(chunks: Sequence[ModelChunk]) -> list[torch.Tensor]:
    """Return the gradient buffers whose precision is too low to hold the target gradient."""
    buffers = [buffer.grad_data for chunk in chunks for buffer in chunk.buffers]
    return [buffer for buffer in buffers if buffer.itemsize < torch.float32.itemsize]


def _preconditioner_bytes(optimizer: Optimizer) -> int:
    sizes = [
        param.numel()
        for part in optimizer_parts(optimizer)
        for group in part.optimizer.param_groups
        for param in group["params"]
    ]
    return max((4 * sum(sizes[place] for place in places) for places in batches(sizes)), default=0)
