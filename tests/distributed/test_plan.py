"""What a plan says of memory and traffic is what ranks hold and send: gloo workers count it while they train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes

from megatron_dwm.model import torch_layers
from megatron_dwm.model.optimizer_parts import optimizer_parts
from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.model.vocabulary import Vocabulary
from megatron_dwm.plan.costs import CostModel
from megatron_dwm.plan.memory import held_activations, in_flight
from megatron_dwm.plan.meter import Meter, Traffic
from megatron_dwm.plan.stages import measure_stages
from megatron_dwm.training.optimizer import allocate_state
from megatron_dwm.weighting.bilevel.gradient_buffers import GradientBuffers
from megatron_dwm.weighting.bilevel.gradient_mean import GradientMean
from tests.distributed.built_model import CONTEXT_PARALLEL, LAYOUTS, build_model, random_mask, random_tokens
from tests.distributed.harness import run_distributed
from tests.small_runs import GPT, IN_PROCESS, LLAMA, NUM_SAMPLES, OLMO2, VOCAB_SIZE, Flags, parse_flags

CASES: dict[str, tuple[int, Flags]] = {
    "llama, TP2, sequence parallel, x PP2": (4, {**LLAMA, **LAYOUTS["TP2 x PP2"][1], "--sequence-parallel": True}),
    "gpt, tied, PP2, interleaved, recomputed": (
        2,
        {
            **GPT,
            **LAYOUTS["PP2, interleaved"][1],
            "--recompute-granularity": "full",
            "--recompute-method": "uniform",
            "--recompute-num-layers": 1,
        },
    ),
    "llama, CP2 x DP2, distributed optimizer, overlapped, bf16": (
        4,
        {**LLAMA, **CONTEXT_PARALLEL["CP2 x DP2, distributed optimizer, overlapped"][1], "--bf16": True},
    ),
    "olmo2, TP2, bf16": (2, {**OLMO2, **LAYOUTS["TP2"][1], "--bf16": True}),
    "gpt, tied, PP2, finite differences": (
        2,
        {**GPT, **LAYOUTS["PP2"][1], "--dwm-alignment": "finite-difference"},
    ),
}


def _count(flags: Flags) -> dict[str, Any]:
    """Train a step and align a batch on this rank, and return what it held and sent."""
    torch_layers.causal_lower_right = _mask  # type: ignore[assignment]  # in this process alone
    built = build_model(flags)
    chunks, optimizer = built.chunks, built.optimizer
    allocate_state(optimizer)
    params = [param for chunk in chunks for param in chunk.parameters()]
    held = {
        "parameters": sum(param.numel() for param in params),
        "weights": sum({s.data_ptr(): s.nbytes() for s in (param.untyped_storage() for param in params)}.values()),
        "gradients": sum(buffer.grad_data.numel() * buffer.grad_data.itemsize for c in chunks for buffer in c.buffers),
        "optimizer": _optimizer_bytes(optimizer, params),
    }
    micro = built.config.training.micro_batch_size
    batch, target = (built.batch(random_tokens(seed), random_mask(seed)) for seed in (1, 2))
    built.engine.run(batch, micro)  # makes megatron-core's buffers
    for chunk in chunks:
        chunk.zero_grad_buffer()
    with Meter() as passes:
        built.engine.run(batch, micro)
    with Meter() as step:
        optimizer.step()
    gradients = built.lm_gradients()
    with Meter() as copy:
        before = ParameterCopy.of(chunks)
    held["parameter copy"] = copy.allocated
    with Meter() as mean:
        gradient_mean = GradientMean(chunks, momentum=0.5)
        gradient_mean.average(GradientBuffers(chunks))
    held["gradient mean"] = mean.allocated
    with Meter() as update, built.engine.full_parameters():
        _, direction = gradients.gradient(target)
        before.swap()
        with Meter() as alignment:
            gradients.align(batch, direction)
        before.restore()
    held["activations"], held["alignment"] = passes.peak, alignment.peak
    return {**held, "step": (passes.traffic + step.traffic).payloads, "update": update.traffic.payloads}


def _mask(queries: int, keys: int) -> CausalBias:
    """Make a mask of a class that cannot be made while a meter looks on."""
    with _disable_current_modes():
        return causal_lower_right(queries, keys)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _optimizer_bytes(optimizer: Any, params: list[Any]) -> int:
    """Bytes of the moments, and of the copies that are stepped in place of the model's parameters."""
    model, total = {param.data_ptr() for param in params}, 0
    for part in optimizer_parts(optimizer):
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                is_copy = param.dtype != params[0].dtype or param.data_ptr() not in model
                total += _bytes(param) * is_copy
                total += sum(_bytes(value) for value in part.optimizer.state[param].values())
    return total


def _payloads(traffic: Mapping[str, Traffic]) -> dict[str, float]:
    return sum(traffic.values(), Traffic()).payloads


@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_what_ranks_hold_and_send(case: str):
    processes, flags = CASES[case]
    flags = {**flags, "--num-layers": 4, "--dwm-target-batch-size": NUM_SAMPLES}
    config = parse_flags({**IN_PROCESS, **flags}, processes)
    stages = measure_stages(config, Vocabulary(VOCAB_SIZE), for_gpu=False)
    counted = run_distributed(_count, processes, flags)
    costs = CostModel(
        config.model, config.weighting, config.sizes, VOCAB_SIZE, stages, None, config.parallel.overlap_param_gather
    )
    for stage in stages:
        found = counted[stage.number * processes // len(stages)]
        assert stage.parameters == found["parameters"]
        assert stage.weights == found["weights"]
        assert stage.gradients == found["gradients"]
        assert stage.optimizer == found["optimizer"]
        assert stage.parameter_copy == found["parameter copy"]
        # Beside it are the sum of its factors and the flag that says whether a gradient was finite.
        assert stage.gradient_mean == pytest.approx(found["gradient mean"], abs=64)
        assert _payloads(costs.step_traffic(stage)) == found["step"]
        assert _payloads(costs.update_traffic(stage)) == found["update"]
        counts = in_flight(config.parallel, config.sizes.virtual_stages, stage.number, config.sizes.num_microbatches)
        activations = held_activations(stage.training, counts)
        # A run holds a few more small tensors, such as masks and the losses that it reports.
        assert activations == pytest.approx(found["activations"], rel=0.06)
        if config.weighting.dwm_alignment == "exact":
            # Of several microbatches, as of the one that the plan runs: a microbatch leaves nothing behind. What hooks
            # hold beside activations, such as token ids, weighs more where activations are recomputed.
            alignment = held_activations(stage.alignment, counts)
            assert alignment == pytest.approx(found["alignment"], rel=0.12)
