"""Checks of flags against flags of other groups and against the number of processes.

Each function raises a UserError, of one line, for values that contradict each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dwm.config.flags import flag_name
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
    _check_world(run)
    _check_divisions(run)
    _check_context_parallelism(run)
    _check_optimizer(run)
    _check_outputs(run)
    _check_batches(run)
    _check_samples(run)
    _check_schedule(run)
    if run.weighting.needs_target:
        _check_passes(run)
        _check_target_batches(run)
        _check_precision(run)
        _check_target(run)


def _check_world(run: RunConfig) -> None:
    tp, pp, cp = run.parallel.tp, run.parallel.pp, run.parallel.cp
    if run.world_size % (tp * pp * cp):
        context = f" x --context-parallel-size {cp}" if cp > 1 else ""
        raise UserError(
            f"world size {run.world_size} is not divisible by --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp}{context}; start a multiple of {tp * pp * cp} processes"
        )


def _check_divisions(run: RunConfig) -> None:
    """Require a model that tensor parallelism can divide."""
    tp, heads = run.parallel.tp, run.parallel.context_parallel_heads
    divided = {
        "--num-attention-heads": run.model.num_attention_heads,
        "--ffn-hidden-size": run.model.ffn,
    }
    if run.model.padded_vocab_size is not None:
        divided["--padded-vocab-size"] = run.model.padded_vocab_size
    if run.parallel.sequence_parallel:
        divided["--seq-length (with --sequence-parallel)"] = run.model.seq_length
    for name, value in divided.items():
        if value % tp:
            raise UserError(f"{name} {value} is not divisible by --tensor-model-parallel-size {tp}; change one")
    groups = run.model.query_groups
    if groups % tp and tp % groups:
        raise UserError(
            f"--num-query-groups {groups} is neither a multiple nor a divisor of "
            f"--tensor-model-parallel-size {tp}; change one"
        )
    if heads > 1 and groups % (tp * heads):
        raise UserError(
            f"--num-query-groups {groups} is not divisible by --tensor-model-parallel-size {tp} x {heads}, the "
            f"ranks that --cp-comm-type {run.parallel.cp_comm_type[0]} divides heads between; use p2p"
        )


def _check_context_parallelism(run: RunConfig) -> None:
    """Require a sequence length that context parallelism can split."""
    sequence, tp, cp = run.model.seq_length, run.parallel.tp, run.parallel.cp
    if cp == 1:
        return
    if sequence % (2 * cp):
        raise UserError(
            f"--seq-length {sequence} is not divisible by 2 x --context-parallel-size {cp}, as each rank holds two "
            "chunks; change one"
        )
    if run.parallel.sequence_parallel and sequence // cp % tp:
        raise UserError(
            f"--seq-length {sequence} / --context-parallel-size {cp} is not divisible by "
            f"--tensor-model-parallel-size {tp}, as --sequence-parallel needs; change one"
        )


def _check_optimizer(run: RunConfig) -> None:
    if run.parallel.use_distributed_optimizer and run.optimizer.optimizer != "adam":
        raise UserError(
            f"--use-distributed-optimizer does not go with --optimizer {run.optimizer.optimizer}: megatron-core "
            "shards only the state of Adam; leave one out"
        )
    ranks, instances = run.world_size // run.parallel.mp, run.parallel.num_distributed_optimizer_instances
    if ranks % instances:
        raise UserError(
            f"--num-distributed-optimizer-instances {instances} does not divide the {ranks} ranks that the "
            "optimizer is sharded over; change it"
        )
    if run.parallel.fp8_param_gather and run.model.fp8 is None:
        raise UserError("--fp8-param-gather needs --fp8-format; give it")
    if run.optimizer.should_decay_qk_layernorm and not run.model.qk_layernorm:
        raise UserError("--apply-wd-to-qk-layernorm has no effect without --qk-layernorm; add it")


def _check_outputs(run: RunConfig) -> None:
    profiling, logging = run.profiling, run.logging
    if profiling.use_pytorch_profiler and logging.tensorboard_dir is None:
        raise UserError("--use-pytorch-profiler writes to --tensorboard-dir; give it")
    if logging.log_progress and run.checkpoint.save is None:
        raise UserError("--log-progress writes to the --save folder; give it")
    if run.tasks.eval_tasks and run.tokenizer.tokenizer_type == "NullTokenizer":
        raise UserError("--eval-tasks are texts, and --tokenizer-type NullTokenizer has none; give another tokenizer")
    if not logging.wandb_project:
        return
    if not logging.wandb_exp_name:
        raise UserError(f"--wandb-project {logging.wandb_project} needs --wandb-exp-name; name the run")
    if logging.wandb_save_dir is None and run.checkpoint.save is None:
        raise UserError(f"--wandb-project {logging.wandb_project} needs --wandb-save-dir or --save; give one")


def _check_batches(run: RunConfig) -> None:
    sizes, chunks = run.sizes.batch_sizes, run.parallel.virtual_stages(run.model.num_layers)
    if chunks is not None:
        for size in sizes.running_sizes:
            microbatches = size // sizes.unit
            _check_groups(run, microbatches, "--global-batch-size or --micro-batch-size")
    _check_evaluation_batches(run)
    samples = run.training.train_samples
    if samples is not None and samples < run.sizes.global_batch_size:
        raise UserError(f"--train-samples {samples} is less than one batch of {run.sizes.global_batch_size}; raise it")


def _check_evaluation_batches(run: RunConfig) -> None:
    if (run.data.eval_micro_batch_size, run.data.eval_global_batch_size) == (None, None):
        return
    size, micro, dp = run.sizes.eval_batch_size, run.sizes.eval_micro_batch, run.sizes.data_parallel_size
    if size % (micro * dp):
        raise UserError(
            f"--eval-global-batch-size {size} is not divisible by --eval-micro-batch-size {micro} x data-parallel "
            f"size {dp}; change one"
        )
    if run.parallel.tp_comm_overlap and micro != run.training.micro_batch_size:
        raise UserError(
            f"--eval-micro-batch-size {micro} with --tp-comm-overlap: its buffers have the shape of a microbatch "
            f"of {run.training.micro_batch_size} samples; leave one out"
        )
    if run.parallel.virtual_stages(run.model.num_layers) is not None:
        _check_groups(run, size // (micro * dp), "--eval-global-batch-size or --eval-micro-batch-size")


def _check_samples(run: RunConfig) -> None:
    evaluations = 1 + run.data.evaluations(0, run.training.train_iters or 0)
    repeats = {
        "train_samples": 1,
        "train_iters": run.sizes.global_batch_size,
        "eval_iters": run.sizes.eval_batch_size * evaluations,
        "dwm_target_batch_size": 1,
    }
    flags = run.flat()
    for name, repeat in repeats.items():
        if (flags[name] or 0) * repeat > MAX_SAMPLES:
            raise UserError(
                f"{flag_name(name)} {flags[name]}: more than {MAX_SAMPLES:.0e} samples would be read; lower it"
            )


def _check_groups(run: RunConfig, microbatches: int, flags: str) -> None:
    """Require a number of microbatches that the interleaved schedule can group.

    Args:
        flags: the flags that determine their number.
    """
    pp, group = run.parallel.pp, run.parallel.microbatch_group_size_per_vp_stage
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


def _check_schedule(run: RunConfig) -> None:
    """Require a learning-rate schedule in the unit of the run's length, with consistent phases."""
    optimizer, training = run.optimizer, run.training
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


def _check_passes(run: RunConfig) -> None:
    """Refuse what the passes of an outer update cannot go with."""
    micro = run.training.micro_batch_size
    unfit = {
        "--fp8-param-gather": (run.parallel.fp8_param_gather, "copies parameters that have 16 or 32 bits"),
        "--defer-embedding-wgrad-compute": (
            run.parallel.defer_embedding_wgrad_compute,
            "reads gradients in the backward pass",
        ),
    }
    for name, (is_given, reason) in unfit.items():
        if is_given:
            raise UserError(f"{name}: an outer update {reason}; leave it out, or use --dwm-mode frozen or off")
    if run.model.fp8 is not None and run.model.fp8_recipe == "delayed":
        raise UserError(
            f"--fp8-format {run.model.fp8} with --fp8-recipe delayed: an outer update's passes would change the "
            "scales of later steps; use --fp8-recipe tensorwise, or --dwm-mode frozen or off"
        )
    if run.parallel.tp_comm_overlap and micro > 1 and run.weighting.dwm_alignment != "finite-difference":
        raise UserError(
            f"--tp-comm-overlap with --micro-batch-size {micro}: its buffers have the shape of a microbatch, and "
            "an outer update reads alignments off single samples; use --micro-batch-size 1, or leave it out"
        )


def _check_target_batches(run: RunConfig) -> None:
    """Require a target batch of whole microbatches on every replica."""
    micro, dp = run.training.micro_batch_size, run.sizes.data_parallel_size
    if run.sizes.target_batch_size % (run.sizes.target_micro_batch * dp):
        raise UserError(
            f"--dwm-target-batch-size {run.sizes.target_batch_size} is not divisible by --micro-batch-size "
            f"{run.sizes.target_micro_batch} x data-parallel size {dp}; change one"
        )
    if run.parallel.tp_comm_overlap and run.sizes.target_micro_batch != micro:
        raise UserError(
            f"--dwm-target-batch-size {run.sizes.target_batch_size} with --tp-comm-overlap: its buffers have the shape "
            f"of a microbatch of {micro} samples; give a multiple of {micro * dp}"
        )
    if run.parallel.virtual_stages(run.model.num_layers) is not None:
        _check_groups(
            run, run.sizes.target_batch_size // (run.sizes.target_micro_batch * dp), "--dwm-target-batch-size"
        )


def _check_precision(run: RunConfig) -> None:
    """Refuse finite differences that half precision would lose."""
    half = "--bf16" if run.optimizer.bf16 else "--fp16" if run.optimizer.fp16 else None
    if half and run.weighting.dwm_alignment == "finite-difference":
        raise UserError(
            f"--dwm-alignment finite-difference with {half}: so small a step is lost in the parameters' rounding; "
            "use --dwm-alignment exact"
        )
    if half and run.weighting.dwm_check:
        raise UserError(
            f"--dwm-check with {half}: the differences that it takes are lost in the parameters' rounding; check "
            f"once without {half}, then train without --dwm-check"
        )


def _check_target(run: RunConfig) -> None:
    """Require a target set, and the moments that its gradient is preconditioned with."""
    if run.optimizer.optimizer == "sgd" and run.weighting.dwm_preconditioner == "adam":
        raise UserError("--dwm-preconditioner adam needs --optimizer adam, not sgd; use --dwm-preconditioner none")
    if not run.weighting.dwm_target_data_path and not run.data.mock_data:
        mode = "--dwm-mode bilevel" if run.weighting.dwm_rule is None else f"--dwm-rule {run.weighting.dwm_rule}"
        raise UserError(f"{mode} needs --dwm-target-data-path; give the target set, or use --dwm-mode off")
