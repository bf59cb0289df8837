"""From the configuration to a Trainer: every part built once, in the order in which they need each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dwm.config.run import RunConfig
from megatron_dwm.data.blend import DataPaths, data_paths
from megatron_dwm.data.hf_tokenizers import vocabulary_fingerprint
from megatron_dwm.data.tokenizers import build_tokenizer, padded_vocab_size
from megatron_dwm.data.validation import check_data
from megatron_dwm.model.engine import PipelineEngine
from megatron_dwm.model.gpt import bind_schedule_hooks, build_model_chunks, wrap_with_ddp
from megatron_dwm.model.transformer_config import transformer_config
from megatron_dwm.runtime.process_groups import initialize, set_seeds
from megatron_dwm.runtime.record_writers import say
from megatron_dwm.runtime.startup_sync import StartupSync
from megatron_dwm.training.checkpoint import CheckpointWriter, latest_checkpoint, load_checkpoint, loading_line
from megatron_dwm.training.dataloaders import Dataloaders
from megatron_dwm.training.optimizer import build_optimizer, build_scheduler
from megatron_dwm.training.reporter import Reporter
from megatron_dwm.training.train_state import TrainComponents, TrainState
from megatron_dwm.training.trainer import Trainer
from megatron_dwm.weighting.bilevel.gradient_check import check_at_start
from megatron_dwm.weighting.bilevel.lm_gradients import LMGradients
from megatron_dwm.weighting.bilevel.outer_update import OuterUpdate
from megatron_dwm.weighting.data_weighting import DataWeighting
from megatron_dwm.weighting.export import WeighterExporter
from megatron_dwm.weighting.sample_gather import SampleGather
from megatron_dwm.weighting.stage_schedule import StageSchedule, bilevel_stages, frozen_stages
from megatron_dwm.weighting.weighter import Weighter
from megatron_dwm.weighting.weighter_init import (
    check_language_model_init,
    classifier_from_json,
    folder_classifier,
    language_model_classifier,
    random_classifier,
)


@dataclass(frozen=True)
class Inputs:
    """What a run reads, checked before any process waits for another."""

    tokenizer: Any
    paths: DataPaths
    stages: StageSchedule | None
    fingerprint: str
    """Of the tokenizer's vocabulary; empty without a weighter."""
    folder_weighter: Any | None
    """The classifier that --dwm-load or --dwm-init-from name, if they name a folder."""

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.vocab_size)


def read_inputs(config: RunConfig, *, reads_data: bool) -> Inputs:
    """Open and check the tokenizer, the data and the weighter's folder.

    Args:
        reads_data: whether this process opens the datasets (one of a run is enough).

    Raises:
        UserError: whatever is wrong with them.
    """
    settings = config.weighting
    tokenizer = build_tokenizer(config.tokenizer)
    paths = data_paths(config.data, settings.dwm_valid_data_path if settings.learns else None)
    if reads_data:
        check_data(paths, config.model.sequence, int(tokenizer.vocab_size), has_evaluation=config.data.eval_iters > 0)
    latest_checkpoint(config.checkpoint)
    if not settings.weighs:
        return Inputs(tokenizer, paths, None, "", None)

    stages = (
        bilevel_stages(settings, config.train_iters) if settings.learns else frozen_stages(settings, config.train_iters)
    )
    fingerprint = vocabulary_fingerprint(tokenizer, config.tokenizer)
    flag, folder = (
        ("--dwm-load", settings.dwm_load) if settings.dwm_load else ("--dwm-init-from", settings.dwm_init_from)
    )
    assert folder is not None
    if settings.learns and folder == "lm":
        check_language_model_init(config.model, settings)
    if folder in ("lm", "random"):
        return Inputs(tokenizer, paths, stages, fingerprint, None)
    vocab, eod = int(tokenizer.vocab_size), int(tokenizer.eod)
    classifier = folder_classifier(flag, folder, config.model.sequence, vocab, eod, fingerprint, config.training.seed)
    return Inputs(tokenizer, paths, stages, fingerprint, classifier)


def build_trainer(config: RunConfig, inputs: Inputs, device: torch.device, startup_sync: StartupSync) -> Trainer:
    """Build everything and load the checkpoint; every rank calls it.

    Raises:
        UserError: flags that the model, the data or the checkpoint do not fit.
    """
    with startup_sync.phase("model configuration"):
        core_config = transformer_config(
            config.model,
            config.parallel,
            config.training,
            config.optimizer,
            device,
            resets_attention_mask=config.data.reset_attention_mask,
        )
    if config.training.deterministic_mode:
        torch.use_deterministic_algorithms(True)
    parallel_state = initialize(
        config.parallel,
        config.parallel.virtual_stages(config.model.layers),
        device,
        startup_sync.store,
        startup_sync.rank,
        startup_sync.world_size,
    )
    set_seeds(config.training.seed, parallel_state)
    padded = config.model.padded_vocab_size or padded_vocab_size(
        inputs.vocab_size, config.model.make_vocab_size_divisible_by, config.parallel.tp
    )
    bare = build_model_chunks(
        core_config,
        config.model,
        vocab_size=padded,
        fp16_lm_cross_entropy=config.optimizer.fp16_lm_cross_entropy,
    )
    chunks = wrap_with_ddp(bare, core_config, config.parallel, config.optimizer, config.training)
    optimizer = build_optimizer(config, chunks)
    bind_schedule_hooks(core_config, chunks, optimizer, config.parallel)
    components = TrainComponents(chunks, optimizer, build_scheduler(config, optimizer))

    train_state, dwm_state = TrainState(), None
    checkpoint = latest_checkpoint(config.checkpoint)
    if checkpoint is not None:
        if parallel_state.is_first_rank:
            say(loading_line(checkpoint))
        train_state, dwm_state = load_checkpoint(config, checkpoint, components, parallel_state)
        if parallel_state.is_first_rank:
            say(
                f"  successfully loaded checkpoint from {checkpoint.parent} {parallel_state.place} "
                f"at iteration {train_state.iteration}"
            )

    engine = PipelineEngine(
        chunks,
        core_config,
        parallel_state,
        config.model.sequence,
        document_end=inputs.tokenizer.eod if config.data.reset_attention_mask else None,
        check_for_nan=config.training.check_for_nan_in_loss_and_grad
        and not (config.optimizer.fp16 and not config.optimizer.loss_scale),  # a dynamic scale minds overflows itself
    )
    dataloaders = Dataloaders(config, inputs.paths, inputs.tokenizer, parallel_state, startup_sync, train_state)
    weighting = None
    if inputs.stages is not None:
        weighting = _build_weighting(config, inputs, inputs.stages, engine, components, dataloaders, device, dwm_state)
    if weighting is not None and config.weighting.dwm_check and train_state.iteration < config.train_iters:
        samples = dataloaders.peek(train_state.consumed_train_samples, weighting.consumed_target_samples)
        with startup_sync.phase("hypergradient"):
            check_at_start(
                config.weighting, engine, optimizer, weighting.sample_gather, config.training.micro_batch, *samples
            )
    exporter = None
    if weighting is not None and config.checkpoint.save is not None:
        exporter = WeighterExporter(config, parallel_state, inputs.paths, inputs.tokenizer, inputs.fingerprint)
    with startup_sync.phase("metrics"):
        reporter = Reporter(config, parallel_state, padded, train_state.iteration)
    writer = CheckpointWriter(config, components, parallel_state)
    return Trainer(
        config, parallel_state, engine, components, dataloaders, weighting, exporter, reporter, writer, train_state
    )


def _build_weighting(
    config: RunConfig,
    inputs: Inputs,
    stages: StageSchedule,
    engine: PipelineEngine,
    components: TrainComponents,
    dataloaders: Dataloaders,
    device: torch.device,
    state: dict[str, Any] | None,
) -> DataWeighting:
    settings, parallel_state = config.weighting, dataloaders.parallel_state
    sample_gather = SampleGather(dataloaders.partition, parallel_state)
    make_classifier = _classifier_maker(config, inputs, engine)

    def make_weighter() -> Weighter:
        return Weighter(make_classifier(), settings, device, bf16=config.optimizer.bf16)

    def restore_weighter(hf_config: str) -> Weighter:
        return Weighter(classifier_from_json(hf_config), settings, device, bf16=config.optimizer.bf16)

    def make_outer_update(weighter: Weighter) -> OuterUpdate:
        lm_gradients = LMGradients(settings, engine, components.optimizer, parallel_state, config.training.micro_batch)
        return OuterUpdate(settings, lm_gradients, weighter, sample_gather)

    consumed = state["consumed_target_samples"] if state is not None else 0
    weighting = DataWeighting(
        settings,
        stages,
        sample_gather,
        inputs.paths.train_sources,
        make_weighter,
        make_outer_update if settings.learns else None,
        dataloaders.target(consumed) if settings.learns else None,
    )
    if state is not None and settings.learns:
        weighting.load_state_dict(state, restore_weighter)
    return weighting


def _classifier_maker(config: RunConfig, inputs: Inputs, engine: PipelineEngine) -> Callable[[], Any]:
    """How the weighter that the flags ask for is made when its time comes; a collective call."""
    settings, vocab, seed = config.weighting, inputs.vocab_size, config.training.seed
    eod = int(inputs.tokenizer.eod)
    if inputs.folder_weighter is not None:
        return lambda: inputs.folder_weighter
    if settings.dwm_init_from == "random":
        return lambda: random_classifier(settings, vocab, config.model.sequence, eod, seed)
    return lambda: language_model_classifier(engine.chunks, config.model, settings, vocab, eod, seed)
