"""Checks of flags against flags of other groups and against the number of processes.

Each function raises a UserError, of one line, for values that contradict each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.flags import flag_name
from megatron_dwm.config.logging import LoggingConfig
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.optimizer import OptimizerConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.profiling import ProfilingConfig
from megatron_dwm.config.run_sizes import RunSizes
from megatron_dwm.config.tasks import TasksConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.config.training import TrainingConfig
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.errors import UserError

if TYPE_CHECKING:
    from megatron_dwm.config.run import RunConfig

MAX_SAMPLES = 10**12
"""An index of more samples does not fit into memory."""


def check_run(run: RunConfig) -> None:
    """Check a whole configuration.

    Raises:
        UserError: values that contradict each other.
    """
    model, parallel, training, weighting = run.model, run.parallel, run.training, run.weighting
    _check_world(run.world_size, parallel)
    _check_divisions(model, parallel)
    _check_context_parallelism(model.seq_length, parallel)
    _check_optimizer(run.world_size, model, parallel, run.optimizer)
    _check_logs(run.logging, run.profiling, run.checkpoint.save)
    _check_tasks(run.tasks, run.tokenizer)
    _check_wandb(run.logging, run.checkpoint.save)
    _check_batches(run.sizes, parallel)
    _check_evaluation_batches(run.sizes, parallel, run.data)
    _check_samples(run.sizes, training, run.data, weighting)
    _check_schedule(training, run.optimizer)
    if weighting.needs_target:
        _check_passes(run.sizes.micro_batch_size, model, parallel, weighting)
        _check_target_batches(run.sizes, parallel)
        _check_precision(run.optimizer, weighting)
        _check_target(run.optimizer, run.data, weighting)


def _check_world(world_size: int, parallel: ParallelConfig) -> None:
    tp, pp, cp = parallel.tp, parallel.pp, parallel.cp
    if world_size % (tp * pp * cp):
        context = f" x --context-parallel-size {cp}" if cp > 1 else ""
        raise UserError(
            f"world size {world_size} is not divisible by --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp}{context}; start a multiple of {tp * pp * cp} processes"
        )


def _check_divisions(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Require a model that tensor parallelism can divide."""
    tp, heads = parallel.tp, parallel.context_parallel_heads
    divided = {
        "--num-attention-heads": model.num_attention_heads,
        "--ffn-hidden-size": model.ffn,
    }
    if model.padded_vocab_size is not None:
        divided["--padded-vocab-size"] = model.padded_vocab_size
    if parallel.sequence_parallel:
        divided["--seq-length (with --sequence-parallel)"] = model.seq_length
    for name, value in divided.items():
        if value % tp:
            raise UserError(f"{name} {value} is not divisible by --tensor-model-parallel-size {tp}; change one")
    groups = model.query_groups
    if groups % tp and tp % groups:
        raise UserError(
            f"--num-query-groups {groups} is neither a multiple nor a divisor of "
            f"--tensor-model-parallel-size {tp}; change one"
        )
    if heads > 1 and groups % (tp * heads):
        raise UserError(
            f"--num-query-groups {groups} is not divisible by --tensor-model-parallel-size {tp} x {heads}, the "
            f"ranks that --cp-comm-type {parallel.cp_comm_type[0]} divides heads between; use p2p"
        )


def _check_context_parallelism(sequence: int, parallel: ParallelConfig) -> None:
    """Require a sequence length that context parallelism can split."""
    tp, cp = parallel.tp, parallel.cp
    if cp == 1:
        return
    if sequence % (2 * cp):
        raise UserError(
            f"--seq-length {sequence} is not divisible by 2 x --context-parallel-size {cp}, as each rank holds two "
            "chunks; change one"
        )
    if parallel.sequence_parallel and sequence // cp % tp:
        raise UserError(
            f"--seq-length {sequence} / --context-parallel-size {cp} is not divisible by "
            f"--tensor-model-parallel-size {tp}, as --sequence-parallel needs; change one"
        )


def _check_optimizer(world_size: int, model: ModelConfig, parallel: ParallelConfig, optimizer: OptimizerConfig) -> None:
    if parallel.use_distributed_optimizer and optimizer.optimizer != "adam":
        raise UserError(
            f"--use-distributed-optimizer excludes --optimizer {optimizer.optimizer}: megatron-core "
            "shards only the state of Adam; leave one out"
        )
    ranks, instances = world_size // parallel.mp, parallel.num_distributed_optimizer_instances
    if ranks % instances:
        raise UserError(
            f"--num-distributed-optimizer-instances {instances} does not divide the {ranks} ranks that the "
            "optimizer is sharded over; change it"
        )
    if parallel.fp8_param_gather and model.fp8 is None:
        raise UserError("--fp8-param-gather needs --fp8-format; give it")
    if optimizer.should_decay_qk_layernorm and not model.qk_layernorm:
        raise UserError("--apply-wd-to-qk-layernorm has no effect without --qk-layernorm; add it")


def _check_logs(logging: LoggingConfig, profiling: ProfilingConfig, save: str | None) -> None:
    if profiling.use_pytorch_profiler and logging.tensorboard_dir is None:
        raise UserError("--use-pytorch-profiler writes to --tensorboard-dir; give it")
    if logging.log_progress and save is None:
        raise UserError("--log-progress writes to the --save folder; give it")


def _check_tasks(tasks: TasksConfig, tokenizer: TokenizerConfig) -> None:
    if tasks.eval_tasks and tokenizer.tokenizer_type == "NullTokenizer":
        raise UserError("--eval-tasks need text, which --tokenizer-type NullTokenizer cannot encode; give another type")


def _check_wandb(logging: LoggingConfig, save: str | None) -> None:
    if not logging.wandb_project:
        return
    if not logging.wandb_exp_name:
        raise UserError(f"--wandb-project {logging.wandb_project} needs --wandb-exp-name; name the run")
    if logging.wandb_save_dir is None and save is None:
        raise UserError(f"--wandb-project {logging.wandb_project} needs --wandb-save-dir or --save; give one")


def _check_batches(sizes: RunSizes, parallel: ParallelConfig) -> None:
    if sizes.virtual_stages is not None:
        for size in sizes.batch_sizes.running_sizes:
            microbatches = size // sizes.batch_sizes.unit
            _check_groups(parallel, microbatches, "--global-batch-size or --micro-batch-size")


def _check_evaluation_batches(sizes: RunSizes, parallel: ParallelConfig, data: DataConfig) -> None:
    if (data.eval_micro_batch_size, data.eval_global_batch_size) == (None, None):
        return
    size, micro, dp = sizes.eval_batch_size, sizes.eval_micro_batch, sizes.data_parallel_size
    if size % (micro * dp):
        raise UserError(
            f"--eval-global-batch-size {size} is not divisible by --eval-micro-batch-size {micro} x data-parallel "
            f"size {dp}; change one"
        )
    if parallel.tp_comm_overlap and micro != sizes.micro_batch_size:
        raise UserError(
            f"--eval-micro-batch-size {micro} with --tp-comm-overlap: its buffers have the shape of a microbatch "
            f"of {sizes.micro_batch_size} samples; leave one out"
        )
    if sizes.virtual_stages is not None:
        _check_groups(parallel, size // (micro * dp), "--eval-global-batch-size or --eval-micro-batch-size")


def _check_samples(sizes: RunSizes, training: TrainingConfig, data: DataConfig, weighting: WeightingConfig) -> None:
    """Refuse a run that is shorter than one batch, or that reads more samples than an index can hold."""
    asked = training.train_samples
    if asked is not None and asked < sizes.global_batch_size:
        raise UserError(f"--train-samples {asked} is less than one batch of {sizes.global_batch_size}; raise it")
    evaluations = 1 + data.evaluations(0, training.train_iters or 0)
    repeated = {
        "train_samples": (training.train_samples, 1),
        "train_iters": (training.train_iters, sizes.global_batch_size),
        "eval_iters": (data.eval_iters, sizes.eval_batch_size * evaluations),
        "dwm_target_batch_size": (weighting.dwm_target_batch_size, 1),
    }
    for name, (value, samples) in repeated.items():
        if (value or 0) * samples > MAX_SAMPLES:
            raise UserError(f"{flag_name(name)} {value}: more than {MAX_SAMPLES:.0e} samples would be read; lower it")


def _check_groups(parallel: ParallelConfig, microbatches: int, flags: str) -> None:
    """Require a number of microbatches that the interleaved schedule can group.

    Args:
        flags: the flags that determine their number.
    """
    pp, group = parallel.pp, parallel.microbatch_group_size_per_vp_stage
    if group is None:
        if microbatches % pp:
            raise UserError(
                f"{microbatches} microbatches are not divisible by --pipeline-model-parallel-size {pp}, which "
                f"virtual stages need; change {flags}"
            )
    elif not pp <= group <= microbatches or 0 < microbatches % group < pp:
        last = f", whose last would have {microbatches % group}" if pp <= group <= microbatches else ""
        raise UserError(
            f"--microbatch-group-size-per-virtual-pipeline-stage {group}: {microbatches} microbatches do not make "
            f"groups of {group}{last}, and each needs at least {pp}, the stages of the pipeline; change it or "
            f"{flags}"
        )


def _check_schedule(training: TrainingConfig, optimizer: OptimizerConfig) -> None:
    """Require a learning-rate schedule in the unit of the run's length, with consistent phases."""
    unit, other = ("iters", "samples") if training.train_samples is None else ("samples", "iters")
    for name in ("lr-decay", "lr-warmup", "lr-wsd-decay"):
        if value := getattr(optimizer, f"{name.replace('-', '_')}_{other}"):
            raise UserError(f"--{name}-{other} {value} has no effect with --train-{unit}; use --{name}-{unit}")
    if optimizer.lr_decay_style == "WSD" and getattr(optimizer, f"lr_wsd_decay_{unit}") is None:
        raise UserError(f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}; give it")
    if getattr(optimizer, f"lr_warmup_{unit}") and optimizer.lr_warmup_fraction is not None:
        raise UserError(f"--lr-warmup-fraction and --lr-warmup-{unit} exclude each other; give one")
    bounds = optimizer.lr_bounds(training.length, 1, is_in_samples=unit == "samples")
    if bounds.warmup >= bounds.decay:
        raise UserError(
            f"the learning rate's warm-up of {bounds.warmup:g} {unit} does not end before its decay at "
            f"{bounds.decay}; lower --lr-warmup-{unit} (or --lr-warmup-fraction) or raise --train-{unit} "
            f"(or --lr-decay-{unit})"
        )


def _check_passes(micro: int, model: ModelConfig, parallel: ParallelConfig, weighting: WeightingConfig) -> None:
    """Refuse flags that the passes of an outer update do not support."""
    unfit = {
        "--fp8-param-gather": (parallel.fp8_param_gather, "copies parameters that have 16 or 32 bits"),
        "--defer-embedding-wgrad-compute": (
            parallel.defer_embedding_wgrad_compute,
            "reads gradients in the backward pass",
        ),
    }
    for name, (is_given, reason) in unfit.items():
        if is_given:
            raise UserError(f"{name}: an outer update {reason}; leave it out, or use --dwm-mode frozen or off")
    if model.fp8 is not None and model.fp8_recipe == "delayed":
        raise UserError(
            f"--fp8-format {model.fp8} with --fp8-recipe delayed: an outer update's passes would change the "
            "scales of later steps; use --fp8-recipe tensorwise, or --dwm-mode frozen or off"
        )
    if parallel.tp_comm_overlap and micro > 1 and weighting.dwm_alignment != "finite-difference":
        raise UserError(
            f"--tp-comm-overlap with --micro-batch-size {micro}: its buffers have the shape of a microbatch, and "
            "an outer update reads alignments off single samples; use --micro-batch-size 1, or leave it out"
        )


def _check_target_batches(sizes: RunSizes, parallel: ParallelConfig) -> None:
    """Require a target batch of whole microbatches on every replica."""
    size, micro, dp = sizes.target_batch_size, sizes.target_micro_batch, sizes.data_parallel_size
    if size % (micro * dp):
        raise UserError(
            f"--dwm-target-batch-size {size} is not divisible by --micro-batch-size {micro} x data-parallel size {dp}; "
            "change one"
        )
    if parallel.tp_comm_overlap and micro != sizes.micro_batch_size:
        raise UserError(
            f"--dwm-target-batch-size {size} with --tp-comm-overlap: its buffers have the shape of a microbatch of "
            f"{sizes.micro_batch_size} samples; give a multiple of {sizes.micro_batch_size * dp}"
        )
    if sizes.virtual_stages is not None:
        _check_groups(parallel, size // (micro * dp), "--dwm-target-batch-size")


def _check_precision(optimizer: OptimizerConfig, weighting: WeightingConfig) -> None:
    """Refuse finite differences that half precision would lose."""
    half = "--bf16" if optimizer.bf16 else "--fp16" if optimizer.fp16 else None
    if half and weighting.dwm_alignment == "finite-difference":
        raise UserError(
            f"--dwm-alignment finite-difference with {half}: its small steps are lost when parameters are rounded; "
            "use --dwm-alignment exact"
        )
    if half and weighting.dwm_check:
        raise UserError(
            f"--dwm-check with {half}: its finite differences are lost when parameters are rounded; check "
            f"once without {half}, then train without --dwm-check"
        )


def _check_target(optimizer: OptimizerConfig, data: DataConfig, weighting: WeightingConfig) -> None:
    """Require a target set, and the moments that its gradient is preconditioned with."""
    if optimizer.optimizer == "sgd" and weighting.dwm_preconditioner == "adam":
        raise UserError("--dwm-preconditioner adam needs --optimizer adam, not sgd; use --dwm-preconditioner none")
    if not weighting.dwm_target_data_path and not data.mock_data:
        mode = "--dwm-mode bilevel" if weighting.dwm_rule is None else f"--dwm-rule {weighting.dwm_rule}"
        raise UserError(f"{mode} needs --dwm-target-data-path; give the target set, or use --dwm-mode off")
