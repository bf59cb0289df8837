"""The whole configuration of a pretraining run, and the checks that concern several of its parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dwm.config.batch_sizes import BatchSizes, Rampup
from megatron_dwm.config.checkpoint import CheckpointConfig
from megatron_dwm.config.checkpoint_args import with_saved_arguments
from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.flags import build, flag_name, parse
from megatron_dwm.config.logging import LoggingConfig
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.no_effect import NoEffectConfig
from megatron_dwm.config.optimizer import OptimizerConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.plan import PlanConfig
from megatron_dwm.config.profiling import ProfilingConfig
from megatron_dwm.config.tasks import TasksConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.config.training import TrainingConfig
from megatron_dwm.config.unsupported_flags import reason_unsupported
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.errors import UserError

PARTS: dict[str, type] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
    "tokenizer": TokenizerConfig,
    "data": DataConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
    "profiling": ProfilingConfig,
    "tasks": TasksConfig,
    "weighting": WeightingConfig,
}
"""The parts of a run's configuration."""
FLAG_GROUPS: dict[str, type] = PARTS | {"plan": PlanConfig, "no_effect": NoEffectConfig}
"""All flags that are accepted."""
MAX_SAMPLES = 10**12
"""An index of more samples does not fit into memory."""
TARGET_PART = 8
"""By default, an outer update reads one target sample for this many samples of the batch."""
TARGET_MOMENTUM = 0.78
"""The running mean then has as little noise as a mean over ``TARGET_PART`` gradients: (1 + 0.78) / (1 - 0.78) = 8."""


@dataclass(frozen=True)
class RunConfig:
    """All flags of a run, checked against each other and the world size."""

    world_size: int
    model: ModelConfig
    parallel: ParallelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    profiling: ProfilingConfig
    tasks: TasksConfig
    weighting: WeightingConfig
    resumed_at: tuple[int, int] = (0, 0)
    """Iterations done and training samples consumed before the run's start or resumption."""

    def __post_init__(self) -> None:
        self._check_world()
        self._check_records()
        self._check_optimizer()
        self._check_shards()
        self._check_sequence()
        self._check_batches()
        self._check_samples()
        self._check_schedule()
        self._check_outer_update()

    def _check_records(self) -> None:
        profiling, logging = self.profiling, self.logging
        if profiling.use_pytorch_profiler and logging.tensorboard_dir is None:
            raise UserError("--use-pytorch-profiler writes to --tensorboard-dir; give it")
        if logging.log_progress and self.checkpoint.save is None:
            raise UserError("--log-progress writes to the --save folder; give it")
        if self.tasks.eval_tasks and self.tokenizer.tokenizer_type == "NullTokenizer":
            raise UserError(
                "--eval-tasks are texts, and --tokenizer-type NullTokenizer has none; give another tokenizer"
            )
        if not logging.wandb_project:
            return
        if not logging.wandb_exp_name:
            raise UserError(f"--wandb-project {logging.wandb_project} needs --wandb-exp-name; name the run")
        if logging.wandb_save_dir is None and self.checkpoint.save is None:
            raise UserError(f"--wandb-project {logging.wandb_project} needs --wandb-save-dir or --save; give one")

    def _check_world(self) -> None:
        tp, pp, cp = self.parallel.tp, self.parallel.pp, self.parallel.cp
        if self.world_size % (tp * pp * cp):
            context = f" x --context-parallel-size {cp}" if cp > 1 else ""
            raise UserError(
                f"world size {self.world_size} is not divisible by --tensor-model-parallel-size {tp} x "
                f"--pipeline-model-parallel-size {pp}{context}; start a multiple of {tp * pp * cp} processes"
            )

    def _check_optimizer(self) -> None:
        if self.optimizer.decays_qk_layernorm and not self.model.qk_layernorm:
            raise UserError("--apply-wd-to-qk-layernorm has no effect without --qk-layernorm; add it")

    def _check_shards(self) -> None:
        if self.parallel.use_distributed_optimizer and self.optimizer.optimizer != "adam":
            raise UserError(
                f"--use-distributed-optimizer does not go with --optimizer {self.optimizer.optimizer}: megatron-core "
                "shards only the state of Adam; leave one out"
            )
        ranks, instances = self.world_size // self.parallel.mp, self.parallel.num_distributed_optimizer_instances
        if ranks % instances:
            raise UserError(
                f"--num-distributed-optimizer-instances {instances} does not divide the {ranks} ranks that the "
                "optimizer is sharded over; change it"
            )
        tp, heads = self.parallel.tp, self.parallel.context_parallel_heads
        divided = {
            "--num-attention-heads": self.model.heads,
            "--ffn-hidden-size": self.model.ffn,
        }
        if self.model.padded_vocab_size is not None:
            divided["--padded-vocab-size"] = self.model.padded_vocab_size
        if self.parallel.sequence_parallel:
            divided["--seq-length (with --sequence-parallel)"] = self.model.sequence
        for name, value in divided.items():
            if value % tp:
                raise UserError(f"{name} {value} is not divisible by --tensor-model-parallel-size {tp}; change one")
        groups = self.model.query_groups
        if groups % tp and tp % groups:
            raise UserError(
                f"--num-query-groups {groups} is neither a multiple nor a divisor of "
                f"--tensor-model-parallel-size {tp}; change one"
            )
        if heads > 1 and groups % (tp * heads):
            raise UserError(
                f"--num-query-groups {groups} is not divisible by --tensor-model-parallel-size {tp} x {heads}, the "
                f"ranks that --cp-comm-type {self.parallel.cp_comm_type[0]} divides heads between; use p2p"
            )

    def _check_sequence(self) -> None:
        """Require a sequence length that context parallelism can split."""
        sequence, tp, cp = self.model.sequence, self.parallel.tp, self.parallel.cp
        if cp == 1:
            return
        if sequence % (2 * cp):
            raise UserError(
                f"--seq-length {sequence} is not divisible by 2 x --context-parallel-size {cp}, as each rank holds two "
                "chunks; change one"
            )
        if self.parallel.sequence_parallel and sequence // cp % tp:
            raise UserError(
                f"--seq-length {sequence} / --context-parallel-size {cp} is not divisible by "
                f"--tensor-model-parallel-size {tp}, as --sequence-parallel needs; change one"
            )

    def _check_batches(self) -> None:
        sizes, chunks = self.batch_sizes, self.parallel.virtual_stages(self.model.layers)
        if chunks is not None:
            for size in sizes.running_sizes:
                microbatches = size // sizes.unit
                self._check_groups(microbatches, "--global-batch-size or --micro-batch-size")
        self._check_evaluation_batches()
        samples = self.training.train_samples
        if samples is not None and samples < self.global_batch_size:
            raise UserError(f"--train-samples {samples} is less than one batch of {self.global_batch_size}; raise it")

    def _check_evaluation_batches(self) -> None:
        if (self.data.eval_micro_batch_size, self.data.eval_global_batch_size) == (None, None):
            return
        size, micro, dp = self.eval_batch_size, self.eval_micro_batch, self.data_parallel_size
        if size % (micro * dp):
            raise UserError(
                f"--eval-global-batch-size {size} is not divisible by --eval-micro-batch-size {micro} x data-parallel "
                f"size {dp}; change one"
            )
        if self.parallel.tp_comm_overlap and micro != self.training.micro_batch:
            raise UserError(
                f"--eval-micro-batch-size {micro} with --tp-comm-overlap: its buffers have the shape of a microbatch "
                f"of {self.training.micro_batch} samples; leave one out"
            )
        if self.parallel.virtual_stages(self.model.layers) is not None:
            self._check_groups(size // (micro * dp), "--eval-global-batch-size or --eval-micro-batch-size")

    def _check_samples(self) -> None:
        evaluations = 1 + self.data.evaluations(0, self.training.train_iters or 0)
        repeats = {
            "train_samples": 1,
            "train_iters": self.global_batch_size,
            "eval_iters": self.eval_batch_size * evaluations,
            "dwm_target_batch_size": 1,
        }
        flags = self.flat()
        for name, repeat in repeats.items():
            if (flags[name] or 0) * repeat > MAX_SAMPLES:
                raise UserError(
                    f"{flag_name(name)} {flags[name]}: more than {MAX_SAMPLES:.0e} samples would be read; lower it"
                )

    def _check_groups(self, microbatches: int, flags: str) -> None:
        """Require a number of microbatches that the interleaved schedule can group.

        Args:
            flags: the flags that determine their number.
        """
        pp, group = self.parallel.pp, self.parallel.microbatch_group_size_per_vp_stage
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

    def _check_schedule(self) -> None:
        """Require a learning-rate schedule in the unit of the run's length, with consistent phases."""
        optimizer, training = self.optimizer, self.training
        unit, other = ("iters", "samples") if training.train_samples is None else ("samples", "iters")
        for name in ("lr-decay", "lr-warmup", "lr-wsd-decay"):
            if value := getattr(optimizer, f"{name.replace('-', '_')}_{other}"):
                raise UserError(f"--{name}-{other} {value} has no effect with --train-{unit}; use --{name}-{unit}")
        if optimizer.lr_decay_style == "WSD" and getattr(optimizer, f"lr_wsd_decay_{unit}") is None:
            raise UserError(f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}; give it")
        if getattr(optimizer, f"lr_warmup_{unit}") and optimizer.lr_warmup_fraction is not None:
            raise UserError(f"--lr-warmup-fraction and --lr-warmup-{unit} exclude each other; give one")
        bounds = optimizer.lr_bounds(training.train_iters, training.train_samples, global_batch_size=1)
        if bounds.warmup >= bounds.decay:
            raise UserError(
                f"the learning rate's warm-up of {bounds.warmup:g} {unit} does not end before its decay at "
                f"{bounds.decay}; lower --lr-warmup-{unit} (or --lr-warmup-fraction) or raise --train-{unit} "
                f"(or --lr-decay-{unit})"
            )

    def _check_outer_update(self) -> None:
        if self.parallel.fp8_param_gather and self.model.fp8 is None:
            raise UserError("--fp8-param-gather needs --fp8-format; give it")
        if not self.weighting.needs_target:
            return
        unfit = {
            "--fp8-param-gather": (self.parallel.fp8_param_gather, "copies parameters that have 16 or 32 bits"),
            "--defer-embedding-wgrad-compute": (
                self.parallel.defer_embedding_wgrad_compute,
                "reads gradients in the backward pass",
            ),
        }
        for name, (is_given, reason) in unfit.items():
            if is_given:
                raise UserError(f"{name}: an outer update {reason}; leave it out, or use --dwm-mode frozen or off")
        if self.model.fp8 is not None and self.model.fp8_recipe == "delayed":
            raise UserError(
                f"--fp8-format {self.model.fp8} with --fp8-recipe delayed: an outer update's passes would change the "
                "scales of later steps; use --fp8-recipe tensorwise, or --dwm-mode frozen or off"
            )
        micro, dp = self.training.micro_batch, self.data_parallel_size
        if self.parallel.tp_comm_overlap and micro > 1 and self.weighting.dwm_alignment != "finite-difference":
            raise UserError(
                f"--tp-comm-overlap with --micro-batch-size {micro}: its buffers have the shape of a microbatch, and "
                "an outer update reads alignments off single samples; use --micro-batch-size 1, or leave it out"
            )
        if self.target_batch_size % (self.target_micro_batch * dp):
            raise UserError(
                f"--dwm-target-batch-size {self.target_batch_size} is not divisible by --micro-batch-size "
                f"{self.target_micro_batch} x data-parallel size {dp}; change one"
            )
        if self.parallel.tp_comm_overlap and self.target_micro_batch != micro:
            raise UserError(
                f"--dwm-target-batch-size {self.target_batch_size} with --tp-comm-overlap: its buffers have the shape "
                f"of a microbatch of {micro} samples; give a multiple of {micro * dp}"
            )
        if self.parallel.virtual_stages(self.model.layers) is not None:
            self._check_groups(self.target_batch_size // (self.target_micro_batch * dp), "--dwm-target-batch-size")
        half = "--bf16" if self.optimizer.bf16 else "--fp16" if self.optimizer.fp16 else None
        if half and self.weighting.dwm_alignment == "finite-difference":
            raise UserError(
                f"--dwm-alignment finite-difference with {half}: so small a step is lost in the parameters' rounding; "
                "use --dwm-alignment exact"
            )
        if half and self.weighting.dwm_check:
            raise UserError(
                f"--dwm-check with {half}: the differences that it takes are lost in the parameters' rounding; check "
                f"once without {half}, then train without --dwm-check"
            )
        if self.optimizer.optimizer == "sgd" and self.weighting.dwm_preconditioner == "adam":
            raise UserError("--dwm-preconditioner adam needs --optimizer adam, not sgd; use --dwm-preconditioner none")
        if not self.weighting.dwm_target_data_path and not self.data.mock_data:
            mode = "--dwm-mode bilevel" if self.weighting.dwm_rule is None else f"--dwm-rule {self.weighting.dwm_rule}"
            raise UserError(f"{mode} needs --dwm-target-data-path; give the target set, or use --dwm-mode off")

    @property
    def data_parallel_size(self) -> int:
        """The number of model replicas."""
        return self.world_size // (self.parallel.tp * self.parallel.pp * self.parallel.cp)

    @property
    def global_batch_size(self) -> int:
        """The number of samples in one step; the largest if steps differ."""
        return self.batch_sizes.running_sizes[-1]

    @property
    def batch_sizes(self) -> BatchSizes:
        """The numbers of samples in the steps of the run."""
        training, micro, dp = self.training, self.training.micro_batch, self.data_parallel_size
        ramp = Rampup(*training.rampup_batch_size) if training.rampup_batch_size is not None else None
        final = training.global_batch_size or micro * dp
        return BatchSizes(final, micro, dp, ramp, training.decrease_batch_size_if_needed)

    @property
    def num_microbatches(self) -> int:
        """The number of microbatches of one model replica in one step."""
        return self.global_batch_size // (self.training.micro_batch * self.data_parallel_size)

    @property
    def eval_batch_size(self) -> int:
        """The number of samples in one batch of an evaluation."""
        return self.data.eval_global_batch_size or self.global_batch_size

    @property
    def eval_micro_batch(self) -> int:
        """The number of samples per microbatch of an evaluation."""
        return self.data.eval_micro_batch_size or self.training.micro_batch

    @property
    def target_batch_size(self) -> int:
        """The number of target samples in one outer update; by default an eighth of the batch, rounded up.

        It is rounded up so that all replicas have the same number of samples, in full microbatches if there are
        several, and in full groups of microbatches with the interleaved schedule. The default for rules that learn no
        weighter is the size of the batch.
        """
        if self.weighting.dwm_target_batch_size is not None:
            return self.weighting.dwm_target_batch_size
        if not self.weighting.has_trainable_weighter:
            return self.global_batch_size
        dp, part = self.data_parallel_size, -(-self.global_batch_size // TARGET_PART)
        unit = dp
        if self.parallel.virtual_stages(self.model.layers) is not None:
            unit *= self.training.micro_batch * (self.parallel.microbatch_group_size_per_vp_stage or self.parallel.pp)
        elif part > self.training.micro_batch * dp or self.parallel.tp_comm_overlap:  # its buffers have a fixed size
            unit *= self.training.micro_batch
        return min(-(-part // unit) * unit, self.global_batch_size)

    @property
    def target_momentum(self) -> float:
        """The momentum of the target gradient's running mean; 0 if there is none."""
        if not self.weighting.has_trainable_weighter:
            return 0.0
        if self.weighting.dwm_target_momentum is not None:
            return self.weighting.dwm_target_momentum
        return TARGET_MOMENTUM if self.weighting.dwm_target_batch_size is None else 0.0

    @property
    def target_micro_batch(self) -> int:
        """The number of samples per target microbatch, at most the run's and at most a replica's target samples."""
        return max(1, min(self.training.micro_batch, self.target_batch_size // self.data_parallel_size))

    @property
    def train_iters(self) -> int:
        """The number of steps of the run."""
        if self.training.train_iters is not None:
            return self.training.train_iters
        assert self.training.train_samples is not None
        iteration, consumed = self.resumed_at  # perhaps in batches of another size
        return iteration + self.batch_sizes.iterations(self.training.train_samples, consumed)

    def flat(self) -> dict[str, Any]:
        """Return all flags by name, as in Megatron-LM's arguments."""
        return {
            field.name: getattr(getattr(self, part), field.name)
            for part, cls in PARTS.items()
            for field in dataclasses.fields(cls)
        }


def parse_run(
    argv: Sequence[str] | None,
    world_size: int,
    *,
    read_saved: Callable[[CheckpointConfig], Mapping[str, Any]] | None = None,
) -> RunConfig:
    """Return the configuration that ``argv`` describes for ``world_size`` processes.

    Args:
        argv: the arguments, without the program's name; ``None`` takes ``sys.argv``.
        world_size: the number of processes of the run.
        read_saved: reads the arguments of the checkpoint to load; without it ``--use-checkpoint-args`` is refused.

    Raises:
        UserError: an unknown flag, a bad value, or values that contradict each other.
    """

    def complete(given: dict[str, Any]) -> dict[str, Any]:
        if not given.get("use_checkpoint_args"):
            return given
        if read_saved is None:
            raise UserError("--use-checkpoint-args is not supported: nothing is loaded here; repeat the model's flags")
        return with_saved_arguments(given, read_saved(build(CheckpointConfig, given)))

    parts = parse(
        argv,
        FLAG_GROUPS,
        prog="pretrain_dwm.py",
        description="Pretrain a Megatron-Core GPT with a data weighting model. Flags are Megatron-LM's, plus --dwm-*.",
        reason_unsupported=reason_unsupported,
        main_class=WeightingConfig,
        complete=complete,
    )
    if parts["plan"].plan:
        raise UserError("--plan is for pretrain_dwm.py and megatron-dwm pretrain; leave it out")
    if parts["no_effect"].no_query_key_layer_scaling and parts["model"].apply_query_key_layer_scaling:
        raise UserError("--no-query-key-layer-scaling contradicts --apply-query-key-layer-scaling; leave one out")
    return RunConfig(world_size=world_size, **{name: parts[name] for name in PARTS})
