"""The plan of a run before it starts, from its flags."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dwm.config.flags import declared_flags
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.run import RunConfig
from megatron_dwm.config.run_sizes import RunSizes
from megatron_dwm.data.blend import data_paths
from megatron_dwm.data.tokenizers import build_tokenizer, vocabulary_rows
from megatron_dwm.errors import UserError
from megatron_dwm.model.tp_comm_overlap import check_tp_comm_overlap
from megatron_dwm.model.transformer_checks import check_attention_mask, check_layers
from megatron_dwm.model.vocabulary import Vocabulary
from megatron_dwm.plan.costs import Cost, CostModel
from megatron_dwm.plan.files import PlannedFile, planned_files
from megatron_dwm.plan.memory import StageMemory, stage_memory
from megatron_dwm.plan.stages import measure_stages
from megatron_dwm.plan.weighter import WeighterPlan, plan_weighter
from megatron_dwm.training.checkpoint_folders import iteration_of, latest_checkpoint
from megatron_dwm.training.save_folder import check_writable, output_folders
from megatron_dwm.weighting.inputs import read_weighter_inputs, run_stages, sample_tokens
from megatron_dwm.weighting.stage_schedule import StageSchedule


@dataclass(frozen=True)
class Layout:
    """The parallel layout of a run."""

    processes: int
    tensor_parallel: int
    pipeline_parallel: int
    virtual_stages: int
    context_parallel: int
    data_parallel: int
    micro_batch_size: int
    global_batch_size: int
    microbatches: int
    """Microbatches of a replica in a step."""


@dataclass(frozen=True)
class WeightingOverhead:
    """What weighting adds to a run's cost, as fractions of the cost of plain training."""

    operations: float
    sent: float


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    layout: Layout
    layers: str
    """The layer implementation with which the memory was measured."""
    model_parameters: int
    padded_vocab_size: int
    train_iters: int
    start_iteration: int
    """Iterations that the checkpoint to continue from has done."""
    tokens: int
    memory: list[StageMemory]
    """Memory of each pipeline stage."""
    weighter: WeighterPlan | None
    step: Cost
    """Cost of a step of plain training."""
    scoring: Cost
    """Cost of the scores of a step."""
    update: Cost
    """Cost of an outer update."""
    updates: list[int]
    """Iterations after which there is an outer update."""
    overhead: WeightingOverhead
    files: list[PlannedFile]

    @property
    def fullest(self) -> StageMemory:
        """The stage that needs the most memory."""
        return max(self.memory, key=lambda stage: stage.peak)


def make_plan(config: RunConfig, *, for_gpu: bool = True) -> Plan:
    """Check a configuration and return its plan; needs a process without process groups and GPUs.

    Args:
        for_gpu: whether the run will use GPUs, whose kernels keep less for the backward pass than a CPU's.

    Raises:
        UserError: the flags are not valid, or a tokenizer, weighter or folder does not fit.
    """
    config, layers = with_known_layers(config)
    check_writable(output_folders(config.checkpoint, config.data, config.logging))
    data_paths(config.data, config.weighting.dwm_target_data_path if config.weighting.needs_target else None)
    folder = latest_checkpoint(config.checkpoint)
    tokenizer = build_tokenizer(config.tokenizer)
    model, parallel, weighting, sizes = config.model, config.parallel, config.weighting, config.sizes
    inputs = None
    if weighting.has_weighter:
        samples = sample_tokens(model.seq_length, tokenizer, config.tokenizer)
        inputs = read_weighter_inputs(weighting, model, samples, config.train_iters, config.training.seed)
    rows = vocabulary_rows(int(tokenizer.vocab_size), model, parallel.tp)
    stages = measure_stages(config, Vocabulary(rows), for_gpu=for_gpu)
    weighter = plan_weighter(weighting, model, sizes, inputs) if inputs is not None else None
    costs = CostModel(model, weighting, sizes, rows, stages, weighter, parallel.overlap_param_gather)
    step, scoring, update = costs.step(), costs.scoring(), costs.update()
    schedule = run_stages(weighting, config.train_iters)
    updates = [i for i in range(1, config.train_iters + 1) if update.operations and schedule.is_update(i)]
    parameters = sum(stage.model_parameters for stage in stages)
    return Plan(
        layout=_layout(parallel, sizes),
        layers=layers,
        model_parameters=parameters,
        padded_vocab_size=rows,
        train_iters=config.train_iters,
        start_iteration=0 if folder is None or config.checkpoint.finetune else iteration_of(folder),
        tokens=sizes.batch_sizes.trained_samples(config.train_iters) * model.seq_length,
        memory=[stage_memory(parallel, weighting, sizes, stage, weighter) for stage in stages],
        weighter=weighter,
        step=step,
        scoring=scoring,
        update=update,
        updates=updates,
        overhead=_overhead(schedule, step, scoring, update, len(updates)),
        files=planned_files(config, schedule, parameters, weighter.parameters if weighter else None),
    )


def plan_values(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON has it, with the sums."""
    values = dataclasses.asdict(plan)
    for row, stage in zip(values["memory"], plan.memory, strict=True):
        row.update(plain=stage.plain, peak=stage.peak)
    for name, cost in (("step", plan.step), ("scoring", plan.scoring), ("update", plan.update)):
        values[name]["total_sent"] = cost.sent
    return values


def with_known_layers(config: RunConfig) -> tuple[RunConfig, str]:
    """Return the configuration with layers that can be built anywhere, and a description of these layers.

    Transformer Engine's layers need a GPU, so torch's layers replace them, without features that only the former have.

    Raises:
        UserError: flags that Transformer Engine's layers cannot follow.
    """
    model, parallel, weighting = config.model, config.parallel, config.weighting
    is_default = model.transformer_impl is None
    impl = model.transformer_impl or ("transformer_engine" if _needs_transformer_engine(model, parallel) else "torch")
    check_tp_comm_overlap(parallel, impl)
    if impl != "transformer_engine":
        return config, f"--transformer-impl {impl}"
    check_layers(model, parallel, "transformer_engine")
    if config.data.reset_attention_mask:
        check_attention_mask(model, "transformer_engine", torch.device("cuda"))
    fp8 = {item.field: item.default for item in declared_flags(ModelConfig) if item.field.startswith("fp8")}
    model = dataclasses.replace(
        model,
        **fp8,
        transformer_impl="torch",
        attention_backend="auto",
        layernorm_zero_centered_gamma=False,  # part of the kernel of Transformer Engine's norms
        fp32_residual_connection=False,
        cross_entropy_fusion_impl="native",
        first_last_layers_bf16=False,
        num_layers_at_start_in_bf16=1,
        num_layers_at_end_in_bf16=1,
    )
    parallel = dataclasses.replace(
        parallel, fp8_param_gather=False, cp_comm_type=["p2p"], hierarchical_context_parallel_sizes=None
    )
    if weighting.dwm_alignment == "exact":  # which falls back to single samples with Transformer Engine's layers
        weighting = dataclasses.replace(weighting, dwm_alignment="single-sample")
    config = dataclasses.replace(config, model=model, parallel=parallel, weighting=weighting)
    needed = ", which the flags need" if is_default else ""
    return config, f"--transformer-impl torch, in place of Transformer Engine's{needed}"


def _needs_transformer_engine(model: ModelConfig, parallel: ParallelConfig) -> bool:
    """Return whether only Transformer Engine's layers can follow the flags."""
    try:
        check_tp_comm_overlap(parallel, "torch")
        check_layers(model, parallel, "torch")
    except UserError:
        return True
    return False


def _layout(parallel: ParallelConfig, sizes: RunSizes) -> Layout:
    return Layout(
        processes=sizes.world_size,
        tensor_parallel=parallel.tp,
        pipeline_parallel=parallel.pp,
        virtual_stages=sizes.virtual_stages or 1,
        context_parallel=parallel.cp,
        data_parallel=sizes.data_parallel_size,
        micro_batch_size=sizes.micro_batch_size,
        global_batch_size=sizes.global_batch_size,
        microbatches=sizes.num_microbatches,
    )


def _overhead(stages: StageSchedule, step: Cost, scoring: Cost, update: Cost, updates: int) -> WeightingOverhead:
    weighted = stages.train_iters - stages.warmup_iters
    operations = weighted * scoring.operations + updates * update.operations
    sent = weighted * scoring.sent + updates * update.sent
    return WeightingOverhead(
        operations / (stages.train_iters * step.operations),
        sent / (stages.train_iters * step.sent) if step.sent else 0.0,
    )
