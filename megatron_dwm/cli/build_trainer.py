"""The trainer of a run, built from its configuration: data, language model, checkpoint and weighting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from megatron_dwm.cli.launch import Process
from megatron_dwm.config.run import RunConfig
from megatron_dwm.config.tasks import TasksConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.extras import require_packages
from megatron_dwm.runtime.logging import print_messages_of

if TYPE_CHECKING:
    from megatron_dwm.training.dataloaders import Dataloaders
    from megatron_dwm.training.evaluator import TaskEvaluation
    from megatron_dwm.training.setup import LanguageModel, RunInputs
    from megatron_dwm.training.trainer import Trainer
    from megatron_dwm.weighting.context import WeightingContext
    from megatron_dwm.weighting.inputs import WeighterInputs
    from megatron_dwm.weighting.policy import SampleWeighting
    from megatron_dwm.weighting.stage_schedule import StageSchedule


def build_trainer(
    config: RunConfig,
    device: torch.device,
    process: Process,
    make_weighting: Callable[[WeightingContext], SampleWeighting] | None = None,
) -> Trainer:
    """Build everything that a run needs and load its checkpoint; every rank calls it.

    Args:
        make_weighting: builds the run's weighting; by default the one that the flags name.

    Raises:
        UserError: on every rank, if data, tokenizer, weighter, model or checkpoint do not fit the flags.
    """
    # Imported here, after the flags are known to be good: these imports take seconds.
    from megatron_dwm.cli.rank_agreement import rank_facts
    from megatron_dwm.training.dataloaders import Dataloaders
    from megatron_dwm.training.setup import (
        build_language_model,
        build_trainer_parts,
        load_if_present,
        lock_folders,
        read_inputs,
    )
    from megatron_dwm.training.trainer import Trainer
    from megatron_dwm.training.write_results import start_results_process
    from megatron_dwm.weighting.build import build_weighting, check_gradients
    from megatron_dwm.weighting.inputs import read_weighter_inputs, run_stages, sample_tokens

    if config.logging.logging_level is not None:
        print_messages_of("megatron.core", process.rank, process.world_size, config.logging.logging_level)
    with process.startup_sync.phase("folders"):
        save_folder = lock_folders(config.checkpoint, config.data, config.logging, process.rank)
    with process.startup_sync.phase("inputs"):
        inputs = read_inputs(config, process.rank, process.world_size)
        weighter_inputs = None
        if config.weighting.has_weighter:
            samples = sample_tokens(config.model.seq_length, inputs.tokenizer, config.tokenizer)
            weighter_inputs = read_weighter_inputs(
                config.weighting, config.model, samples, config.train_iters, config.training.seed
            )
        if inputs.checkpoint is None:  # the length of a continued run is known when its checkpoint is loaded
            run_stages(config.weighting, config.train_iters)
    with process.startup_sync.phase("agreement"):
        digest = weighter_inputs.digest if weighter_inputs is not None else None
        process.startup_sync.require_same(rank_facts(config, inputs.paths, digest))
    if config.checkpoint.save is not None:
        start_results_process()
    language_model = build_language_model(config, inputs, device, process.startup_sync)
    train_state, weighting_state = load_if_present(config, inputs, language_model, save_folder)
    if train_state.iteration > 0:  # a release has a nonzero count of samples, but starts at iteration 0
        config = dataclasses.replace(config, resumed_at=(train_state.iteration, train_state.consumed_train_samples))
    dataloaders = Dataloaders(
        config, inputs.paths, inputs.tokenizer, language_model.parallel_state, process.startup_sync, train_state
    )
    with process.startup_sync.phase("stages"):
        has_begun = train_state.iteration > 0 and weighting_state.get("weighter") is not None
        stages = run_stages(config.weighting, config.train_iters, train_state.iteration if has_begun else None)
    context = _weighting_context(config, inputs, weighter_inputs, stages, language_model, dataloaders, device)
    with process.startup_sync.phase("weighting"):
        weighting = (make_weighting or build_weighting)(context)
        weighting.load_state_dict(weighting_state)
    if config.weighting.dwm_check and train_state.iteration < config.train_iters:
        consumed_target = weighting_state.get("consumed_target_samples", 0)
        batches = dataloaders.peek(train_state.consumed_train_samples, consumed_target)
        with process.startup_sync.phase("hypergradient"):
            check_gradients(context, *batches)
    parts = build_trainer_parts(config, language_model, dataloaders, train_state, process.startup_sync, save_folder)
    with process.startup_sync.phase("tasks"):
        evaluate_tasks = None
        if config.tasks.eval_tasks is not None:
            micro_batch = config.training.micro_batch_size
            evaluate_tasks = _task_evaluation(config.tasks, config.tokenizer, micro_batch, inputs, language_model)
        parts = dataclasses.replace(parts, evaluate_tasks=evaluate_tasks)
    process.startup_sync.end()
    return Trainer(config, parts, weighting)


def _task_evaluation(
    tasks: TasksConfig, tokenizer: TokenizerConfig, micro_batch: int, inputs: RunInputs, language_model: LanguageModel
) -> TaskEvaluation:
    """Return the evaluation of the run's model on tasks.

    Raises:
        UserError: the tasks or the tokenizer do not allow it.
    """
    require_packages("--eval-tasks", "lm_eval")
    from megatron_dwm.analysis.in_loop_tasks import InLoopTaskEvaluator
    from megatron_dwm.data.hf_tokenizers import to_hf_tokenizer

    hf_tokenizer, vocabulary = to_hf_tokenizer(inputs.tokenizer, tokenizer), language_model.components.vocabulary
    # An imported model may have more tokens than its tokenizer; in a model made here, the other rows are padding.
    size = vocabulary.tokens or inputs.vocab_size
    return InLoopTaskEvaluator(tasks, language_model.engine, hf_tokenizer, size, micro_batch).evaluate


def _weighting_context(
    config: RunConfig,
    inputs: RunInputs,
    weighter_inputs: WeighterInputs | None,
    stages: StageSchedule,
    language_model: LanguageModel,
    dataloaders: Dataloaders,
    device: torch.device,
) -> WeightingContext:
    """Return the parts of the run that its weighting needs."""
    from megatron_dwm.weighting.context import WeightingContext

    return WeightingContext(
        settings=config.weighting,
        model=config.model,
        sizes=config.sizes,
        seed=config.training.seed,
        bf16=config.optimizer.bf16,
        log_interval=config.logging.log_interval,
        save=config.checkpoint.save,
        inputs=weighter_inputs,
        stages=stages,
        paths=inputs.paths,
        tokenizer=inputs.tokenizer,
        tokenizer_flags=config.tokenizer,
        padded_vocab_size=language_model.padded_vocab_size,
        engine=language_model.engine,
        optimizer=language_model.components.optimizer,
        partition=dataloaders.partition,
        parallel_state=language_model.parallel_state,
        make_target_loader=dataloaders.target,
        device=device,
    )
