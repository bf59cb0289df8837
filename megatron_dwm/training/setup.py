"""Builds the parts of a trainer from the configuration, in the order in which they depend on each other."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dwm.atomic_write import remove_unfinished_files
from megatron_dwm.config.checkpoint import CheckpointConfig
from megatron_dwm.config.checkpoint_args import first_rank_file
from megatron_dwm.config.data import DataConfig
from megatron_dwm.config.logging import LoggingConfig
from megatron_dwm.config.model import ModelConfig
from megatron_dwm.config.run import RunConfig
from megatron_dwm.data.blend import DataPaths, data_paths
from megatron_dwm.data.tokenizers import build_tokenizer, vocabulary_rows
from megatron_dwm.data.validation import check_data
from megatron_dwm.errors import reported_lack_of_memory
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.model.flops import training_flops
from megatron_dwm.model.gpt import bind_schedule_hooks, build_model_chunks, wrap_with_ddp
from megatron_dwm.model.memory import memory_estimate
from megatron_dwm.model.tp_comm_overlap import start_tp_comm_overlap
from megatron_dwm.model.transformer_config import transformer_config
from megatron_dwm.model.vocabulary import Vocabulary, saved_tokens
from megatron_dwm.runtime.energy import EnergyMeter
from megatron_dwm.runtime.process_groups import ParallelState, initialize_process_groups, set_seeds
from megatron_dwm.runtime.startup_sync import StartupSync
from megatron_dwm.runtime.stragglers import StragglerReport
from megatron_dwm.runtime.timers import StepTimers
from megatron_dwm.training.checkpoint import CheckpointWriter
from megatron_dwm.training.checkpoint_folders import latest_checkpoint, loading_line
from megatron_dwm.training.checkpoint_loading import load_checkpoint
from megatron_dwm.training.dataloaders import Dataloaders
from megatron_dwm.training.lr_schedule import Schedule, build_scheduler
from megatron_dwm.training.memory_report import MemoryReport
from megatron_dwm.training.optimizer import build_optimizer
from megatron_dwm.training.profiler import StepProfiler
from megatron_dwm.training.progress_log import ProgressLog
from megatron_dwm.training.reporter import ReportedRun, Reporter, peak_tflops
from megatron_dwm.training.resume_checks import check_resume, overruled_flags, resume_warnings, resumed_vocab_size
from megatron_dwm.training.run_recorder import RunRecorder, open_recorder
from megatron_dwm.training.save_folder import SaveFolder, check_owner, check_writable, output_folders, visible_holders
from megatron_dwm.training.saved_checkpoint import SavedCheckpoint, open_checkpoint
from megatron_dwm.training.torch_format import open_torch_checkpoint
from megatron_dwm.training.train_state import TrainComponents, TrainState
from megatron_dwm.training.trainer import TrainerParts
from megatron_dwm.weighting.policy import State

logger = logging.getLogger(__name__)

_REMEDY_FOR_MEMORY = (
    "make --num-layers, --hidden-size, --ffn-hidden-size or the vocabulary smaller, or divide it over more ranks; "
    "--plan says what it needs"
)


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run, checked before any process waits for another."""

    tokenizer: Any
    paths: DataPaths
    checkpoint: SavedCheckpoint | None
    """The checkpoint to continue from; None to start from scratch."""

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return int(self.tokenizer.vocab_size)


@dataclass(frozen=True)
class LanguageModel:
    """The model in training: its parts on this rank, and its process groups."""

    parallel_state: ParallelState
    engine: PipelineEngine
    components: TrainComponents

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.components.vocabulary.rows


def lock_folders(
    checkpoint: CheckpointConfig, data: DataConfig, logging_flags: LoggingConfig, rank: int
) -> SaveFolder | None:
    """Lock the ``--save`` folder for this run, and check that all output folders are writable.

    Returns:
        the folder, on the first rank; it is released when this process ends.

    Raises:
        UserError: a folder cannot be written to, or is another run's.
    """
    if rank != 0:
        return None
    check_writable(output_folders(checkpoint, data, logging_flags))
    if data.data_cache_path:
        remove_unfinished_files(Path(data.data_cache_path))
    check_owner(checkpoint)
    if not checkpoint.save:
        return None
    non_persistent = checkpoint.non_persistent_save_interval and checkpoint.non_persistent_global_ckpt_dir
    return SaveFolder(Path(checkpoint.save), Path(non_persistent) if non_persistent else None)


def read_inputs(config: RunConfig, rank: int, world_size: int) -> RunInputs:
    """Open and check the tokenizer, the data and the checkpoint; the first rank checks the data for all.

    Raises:
        UserError: one of them is invalid.
    """
    settings = config.weighting
    tokenizer = build_tokenizer(config.tokenizer)
    paths = data_paths(config.data, settings.dwm_target_data_path if settings.needs_target else None)
    if rank == 0:
        check_data(
            paths,
            config.model.seq_length,
            int(tokenizer.vocab_size),
            has_evaluation=config.data.has_validation,
            should_read_whole_sets=config.data.full_validation,
        )
    folder = latest_checkpoint(config.checkpoint)
    if folder is None:
        return RunInputs(tokenizer, paths, None)
    if (torch_file := first_rank_file(folder)) is not None:
        torch_checkpoint = open_torch_checkpoint(torch_file, config.checkpoint, config.parallel, config.sizes, rank)
        check_resume(config, torch_checkpoint)
        return RunInputs(tokenizer, paths, torch_checkpoint)
    should_verify = config.checkpoint.checkpoint_checksums
    checkpoint = open_checkpoint(folder, should_verify=should_verify, rank=rank, world_size=world_size)
    check_resume(config, checkpoint)
    return RunInputs(tokenizer, paths, checkpoint)


def build_language_model(
    config: RunConfig, inputs: RunInputs, device: torch.device, startup_sync: StartupSync
) -> LanguageModel:
    """Build the process groups, the model, its optimizer and the engine that runs it; every rank calls it.

    Raises:
        UserError: on every rank, if the flags do not define a valid model.
    """
    with startup_sync.phase("model configuration"):
        core_config = transformer_config(
            config.model,
            config.parallel,
            config.training,
            config.optimizer,
            device,
            has_attention_mask=config.data.reset_attention_mask,
        )
        vocabulary = _vocabulary(config.model, config.parallel.tp, inputs)
    if config.training.deterministic_mode:
        torch.use_deterministic_algorithms(True)
    parallel_state = initialize_process_groups(
        config.parallel,
        config.sizes.virtual_stages,
        device,
        startup_sync.store,
        startup_sync.rank,
        startup_sync.world_size,
    )
    set_seeds(config.training.seed, parallel_state)
    start_tp_comm_overlap(config.model, config.parallel, core_config, config.training.micro_batch_size)
    document_end = inputs.tokenizer.eod if config.data.reset_attention_mask else None
    return assemble_language_model(config, core_config, vocabulary, parallel_state, document_end)


def assemble_language_model(
    config: RunConfig,
    core_config: TransformerConfig,
    vocabulary: Vocabulary,
    parallel_state: ParallelState,
    document_end: int | None,
) -> LanguageModel:
    """Build the model, its optimizer and the engine that runs it, in the current process groups; every rank calls it.

    Args:
        document_end: end-of-document token that attention must not cross, if any.

    Raises:
        UserError: the model needs more memory than there is.
    """
    with reported_lack_of_memory("model", _REMEDY_FOR_MEMORY):
        bare = build_model_chunks(
            core_config,
            config.model,
            vocabulary=vocabulary,
            fp16_lm_cross_entropy=config.optimizer.fp16_lm_cross_entropy,
        )
        chunks = wrap_with_ddp(bare, core_config, config.parallel, config.optimizer, config.training)
        optimizer = build_optimizer(config.optimizer, config.model, config.parallel, config.profiling, chunks)
    bind_schedule_hooks(core_config, chunks, optimizer, config.parallel)
    schedule = Schedule.from_flags(config.optimizer, config.training, config.sizes.global_batch_size)
    components = TrainComponents(chunks, optimizer, build_scheduler(schedule, optimizer), vocabulary)
    engine = PipelineEngine(
        chunks,
        core_config,
        parallel_state,
        config.model.seq_length,
        document_end=document_end,
        check_for_nan=config.training.should_check_for_nan(config.optimizer),
    )
    return LanguageModel(parallel_state, engine, components)


def _vocabulary(model: ModelConfig, tp: int, inputs: RunInputs) -> Vocabulary:
    padded = vocabulary_rows(inputs.vocab_size, model, tp)
    if inputs.checkpoint is None:
        return Vocabulary(padded)
    rows = resumed_vocab_size(inputs.checkpoint, padded, inputs.vocab_size, model.padded_vocab_size, tp)
    vocabulary = Vocabulary(rows, saved_tokens(vars(inputs.checkpoint.arguments)))
    vocabulary.require_tokens(inputs.vocab_size)
    return vocabulary


def load_if_present(
    config: RunConfig, inputs: RunInputs, language_model: LanguageModel, save_folder: SaveFolder | None
) -> tuple[TrainState, State]:
    """Load the checkpoint that the flags name, if there is one; every rank calls it.

    Args:
        save_folder: on the first rank, if the run saves.

    Returns:
        the counters of its run, and its weighting's state (empty if it has none).

    Raises:
        UserError: the checkpoint does not fit.
    """
    if inputs.checkpoint is None:
        if config.checkpoint.load is not None:
            logger.info(f" > --load {config.checkpoint.load} holds no checkpoint yet: the run starts from scratch")
        elif save_folder is not None:
            save_folder.warn_of_other_run()
        return TrainState(), {}
    folder, parallel_state = inputs.checkpoint.folder, language_model.parallel_state
    logger.info(loading_line(folder))
    train_state, weighting_state = load_checkpoint(config, inputs.checkpoint, language_model.components, parallel_state)
    logger.info(
        f"  successfully loaded checkpoint from {folder.parent} {parallel_state.tp_pp_label} "
        f"at iteration {train_state.iteration}"
    )
    has_weighter = weighting_state.get("weighter") is not None
    for line in overruled_flags(config, inputs.checkpoint, has_weighter=has_weighter):
        logger.info(line)
    for line in resume_warnings(config, inputs.checkpoint, train_state, weighting_state):
        logger.warning(line)
    return train_state, weighting_state


def _reporter(
    config: RunConfig, language_model: LanguageModel, train_state: TrainState, timers: StepTimers
) -> Reporter:
    parallel_state, vocab = language_model.parallel_state, language_model.padded_vocab_size
    records = RunRecorder()
    energy = EnergyMeter(is_wanted=config.profiling.log_energy)
    if parallel_state.is_last_rank:
        has_trained = train_state.iteration >= config.train_iters and not config.training.skip_train
        records = open_recorder(
            config.logging, config.checkpoint.save, config.flat(), train_state, has_trained=has_trained
        )
    estimate = partial(
        memory_estimate,
        config.model,
        config.parallel,
        padded_vocab_size=vocab,
        data_parallel_size=config.sizes.data_parallel_size,
        micro_batch_size=config.training.micro_batch_size,
        num_microbatches=config.sizes.num_microbatches,
    )
    memory = MemoryReport(config.logging, parallel_state, estimate)
    run = ReportedRun(
        train_iters=config.train_iters,
        batch_size=config.sizes.global_batch_size,
        seq_length=config.model.seq_length,
        flops_per_step=training_flops(config.model, vocab, config.sizes.global_batch_size),
        peak_tflops=peak_tflops(config.logging, config.optimizer),
        is_trained=not config.training.skip_train,
        has_set_names=config.data.validation_set_names is not None,
    )
    return Reporter(run, config.logging, parallel_state, records, memory, timers, energy)


def build_trainer_parts(
    config: RunConfig,
    language_model: LanguageModel,
    dataloaders: Dataloaders,
    train_state: TrainState,
    startup_sync: StartupSync,
    save_folder: SaveFolder | None,
) -> TrainerParts:
    """Build the reporter and the checkpoint writer; every rank calls it. The first files are written here.

    Raises:
        UserError: on every rank, if a file cannot be written.
    """
    parallel_state, components = language_model.parallel_state, language_model.components
    timers = StepTimers(config.profiling)
    should_log_progress = config.logging.log_progress and parallel_state.is_first_rank
    with startup_sync.phase("metrics"):
        if save_folder is not None:
            save_folder.create()
        profiler = StepProfiler(
            config.profiling,
            config.logging.tensorboard_dir,
            parallel_state.rank,
            is_last_rank=parallel_state.is_last_rank,
        )
        stragglers = StragglerReport(config.profiling, parallel_state.rank, parallel_state.world_size)
        reporter = _reporter(config, language_model, train_state, timers)
    if config.checkpoint.save is not None:
        with startup_sync.phase("shared folders"):
            holders = visible_holders(config.checkpoint) if save_folder is None else save_folder.holders
            remedy = "give the absolute path of a folder that all ranks share"
            startup_sync.require_same(holders, "holders", remedy)
    progress = ProgressLog(
        Path(str(config.checkpoint.save)) if should_log_progress else None,
        parallel_state.world_size,
        config.model.seq_length,
        train_state.num_floating_point_operations_so_far,
    )
    return TrainerParts(
        parallel_state=parallel_state,
        engine=language_model.engine,
        components=components,
        dataloaders=dataloaders,
        reporter=reporter,
        checkpoints=CheckpointWriter(
            config.checkpoint, config.parallel, config.arguments(), components, parallel_state, save_folder, progress
        ),
        train_state=train_state,
        timers=timers,
        profiler=profiler,
        stragglers=stragglers,
    )
