"""Formatting of a plan as text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from megatron_dwm.plan.costs import Cost
from megatron_dwm.plan.files import PlannedFile
from megatron_dwm.plan.memory import StageMemory
from megatron_dwm.plan.plan import Plan

GIB = 1024**3
MAX_ROWS = 8
"""Maximum number of stages that are shown; of more stages, those at both ends."""


def plan_lines(plan: Plan) -> list[str]:
    """Return the lines of a plan."""
    return [*_layout(plan), "", *_memory(plan), "", *_costs(plan), "", *_updates(plan), "", *_files(plan.files)]


def _layout(plan: Plan) -> list[str]:
    layout = plan.layout
    context = f" x context {layout.context_parallel}" if layout.context_parallel > 1 else ""
    virtual = f" ({layout.virtual_stages} virtual stages each)" if layout.virtual_stages > 1 else ""
    start = f", from iteration {plan.start_iteration} on" if plan.start_iteration else ""
    weighter = []
    if plan.weighter is not None:
        weighter = [f"weighter         {plan.weighter.parameters:,} parameters ({plan.weighter.kind}), on every rank"]
    return [
        f"layout           {layout.processes} ranks = tensor {layout.tensor_parallel} x pipeline "
        f"{layout.pipeline_parallel}{virtual}{context} x data {layout.data_parallel}",
        f"step             {layout.global_batch_size} samples: {layout.microbatches} microbatches of "
        f"{layout.micro_batch_size} on each replica",
        f"run              {plan.train_iters} iterations{start}, {plan.tokens / 1e9:.4g} billion tokens",
        f"language model   {plan.model_parameters:,} parameters, vocabulary padded to {plan.padded_vocab_size}",
        *weighter,
    ]


def _memory(plan: Plan) -> list[str]:
    stages = plan.memory
    shown = stages if len(stages) <= MAX_ROWS else [*stages[: MAX_ROWS // 2], *stages[-MAX_ROWS // 2 :]]
    head = ["stage", "layers", "parameters", "weights", "gradients", "optimizer", "activations", "plain", "weighting"]
    rows = [[*head, "in an update", "peak"], *(_memory_row(stage) for stage in shown)]
    left_out = f"; {len(stages) - len(shown)} stages between them are left out" if len(shown) < len(stages) else ""
    return [
        f"memory of a rank, GiB, by pipeline stage{left_out}",
        *_table(rows),
        f"  activations of {plan.layers}; without the CUDA context, NCCL's buffers and fragmentation",
        f"  fullest rank: {_gib(plan.fullest.peak)} GiB on stage {plan.fullest.stage}, "
        f"{_gib(plan.fullest.plain)} GiB of it in plain training",
    ]


def _memory_row(stage: StageMemory) -> list[str]:
    sizes = [stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.plain]
    weighting = [stage.weighting_between_updates, stage.weighting_in_update, stage.peak]
    return [str(stage.stage), str(stage.layers), f"{stage.parameters:,}", *map(_gib, [*sizes, *weighting])]


def _costs(plan: Plan) -> list[str]:
    parts = {"a step": plan.step, "scoring": plan.scoring, "an outer update": plan.update}
    ranks = plan.layout.processes
    purposes = list(dict.fromkeys(purpose for cost in parts.values() for purpose in cost.traffic))
    rows = [["", "TFLOP a rank", "GiB sent", *purposes]]
    rows += [_cost_row(name, cost, ranks, purposes) for name, cost in parts.items() if cost.operations]
    lines = ["operations, and bytes that a rank sends (of the stage that sends most), by purpose", *_table(rows)]
    if plan.overhead.operations:
        lines.append(
            f"  weighting adds {plan.overhead.operations:.2%} to the operations of plain training, and "
            f"{plan.overhead.sent:.2%} to the bytes sent"
        )
    return lines


def _cost_row(name: str, cost: Cost, ranks: int, purposes: Sequence[str]) -> list[str]:
    sent = [_gib(cost.traffic[purpose].total) if purpose in cost.traffic else "" for purpose in purposes]
    return [name, f"{cost.operations / ranks / 1e12:.4g}", _gib(cost.sent), *sent]


def _updates(plan: Plan) -> list[str]:
    updates = plan.updates
    if not updates:
        return ["outer updates    none"]
    steps = sorted({later - earlier for earlier, later in pairwise(updates)})
    every = f", every {' or '.join(map(str, steps))}" if 0 < len(steps) <= 3 else ""
    return [f"outer updates    {len(updates)}: after iterations {updates[0]} to {updates[-1]}{every}"]


def _files(files: Sequence[PlannedFile]) -> list[str]:
    if not files:
        return ["files            none: neither --save nor another folder is given"]
    rows = [["file", "times", "GiB each", "what"]]
    rows += [[file.path, str(file.times), "" if file.size is None else _gib(file.size), file.what] for file in files]
    return ["files", *_table(rows, is_last_left=True)]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 100 or size == 0 else f"{size / GIB:.1g}"


def _table(rows: Sequence[Sequence[str]], *, is_last_left: bool = False) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        if is_last_left:
            cells[-1] = row[-1]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
