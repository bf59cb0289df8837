"""Checks, before anything is loaded, that a run can continue from a checkpoint with its flags."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from megatron_dwm.config.checkpoint import CheckpointConfig
from megatron_dwm.config.checkpoint_args import differing_flag
from megatron_dwm.config.flags import flag_name
from megatron_dwm.config.optimizer import OptimizerConfig
from megatron_dwm.config.parallel import ParallelConfig
from megatron_dwm.config.run import RunConfig
from megatron_dwm.config.training import TrainingConfig
from megatron_dwm.config.weighting import TARGETED_RULES, WeightingConfig
from megatron_dwm.data.blend import TARGET_FLAG
from megatron_dwm.errors import UserError, shortened
from megatron_dwm.training.checkpoint_contents import EVALUATIONS_DUE
from megatron_dwm.training.checkpoint_folders import DWM_STATE
from megatron_dwm.training.lr_schedule import Resumed, Schedule, choose_schedule
from megatron_dwm.training.saved_checkpoint import DamagedCheckpointError, SavedCheckpoint, reported_damage
from megatron_dwm.training.train_state import EVALUATIONS, TrainState
from megatron_dwm.weighting.policy import State

logger = logging.getLogger(__name__)

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
_REPLACING = ("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "clip_grad", "dwm_lr", "dwm_weight_decay")
"""Flags whose given values replace those of the checkpoint."""
_OF_A_NEW_WEIGHTER = (
    "dwm_init_from",
    "dwm_num_layers",
    "dwm_hidden_size",
    "dwm_num_attention_heads",
    "dwm_ffn_hidden_size",
    "dwm_ngram_lengths",
    "dwm_ngram_buckets",
    "dwm_calibration_points",
    "dwm_ngram_hidden_size",
)
"""Flags without effect on a checkpoint's weighter; for ``dwm_arch`` the weighting logs it."""
_OF_A_NEW_MODEL = ("init_method_std", "init_method_xavier_uniform", "embedding_init_method_std")
"""Flags without effect on a checkpoint's model."""


def should_load_optimizer(flags: CheckpointConfig, saved: SavedCheckpoint) -> bool:
    """Return whether the optimizer and the schedule continue from the checkpoint."""
    has_state = "optimizer" in saved.common or any("optimizer" in key for key in saved.metadata.state_dict_metadata)
    return has_state and not (flags.finetune or saved.is_release or flags.no_load_optim)


def has_same_layout(parallel: ParallelConfig, saved: SavedCheckpoint) -> bool:
    """Return whether the checkpoint was saved under this TP and PP size."""
    arguments = saved.arguments
    sizes = [getattr(arguments, f"{axis}_model_parallel_size", 1) for axis in ("tensor", "pipeline")]
    return sizes == [parallel.tp, parallel.pp]


def check_resume(config: RunConfig, saved: SavedCheckpoint) -> None:
    """Check the flags against the checkpoint; no communication.

    Raises:
        UserError: it has another model, optimizer or schedule, or its state cannot be loaded in this layout.
    """
    load = config.checkpoint.load
    run, arguments = config.arguments(), vars(saved.arguments)
    if difference := differing_flag(run, arguments, finetune=config.checkpoint.finetune):
        raise UserError(f"--load {load}: {difference}")
    _check_counters(config.checkpoint, saved)
    _check_weighting_state(config.weighting, config.checkpoint, saved)
    if not should_load_optimizer(config.checkpoint, saved):
        return
    name = arguments.get("optimizer", config.optimizer.optimizer)
    if name != config.optimizer.optimizer:
        raise UserError(
            f"--load {load}: --optimizer {config.optimizer.optimizer} cannot use the checkpoint's state of "
            f"{name}; change it, or load with --no-load-optim"
        )
    sharding = sharding_type(saved)
    if sharding not in (None, "fully_reshardable") and not has_same_layout(config.parallel, saved):
        raise UserError(
            f"--load {load}: the distributed optimizer's state was saved as {sharding} and cannot move to "
            "another TP or PP size; save with --dist-ckpt-optim-fully-reshardable, or load with --no-load-optim"
        )
    try:
        with reported_damage(saved.folder):  # a part of the schedule is missing or invalid
            resumed_schedule(config.optimizer, config.training, config.sizes.global_batch_size, saved)
    except UserError as error:
        if str(error).startswith("--load "):
            raise
        raise UserError(f"--load {load}: {error}") from None


def _check_counters(flags: CheckpointConfig, saved: SavedCheckpoint) -> None:
    """Refuse a checkpoint that lacks the counters of its run.

    Raises:
        UserError: it is damaged.
    """
    if flags.finetune or saved.is_release:
        return
    arguments = vars(saved.arguments)
    counters = {"iteration": saved.common.get("iteration")}
    names = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    counters |= {name: arguments[name] for name in names if name in arguments}
    with reported_damage(saved.folder):
        for name, value in counters.items():
            if not isinstance(value, int) or value < 0:
                raise DamagedCheckpointError(f"its {name} is {shortened(value, 40)}")
        due = arguments.get(EVALUATIONS_DUE, [])
        if not isinstance(due, list) or any(name not in EVALUATIONS for name in due):
            raise DamagedCheckpointError(f"its {EVALUATIONS_DUE} is {shortened(due, 40)}")


def _check_weighting_state(weighting: WeightingConfig, flags: CheckpointConfig, saved: SavedCheckpoint) -> None:
    """Refuse a checkpoint that lacks the weighting's state, or its position in the target set.

    Raises:
        UserError: the file is missing.
    """
    arguments = vars(saved.arguments)
    had_state = arguments.get("dwm_mode") == "bilevel" or arguments.get("dwm_rule") in TARGETED_RULES
    is_continued = weighting.needs_target and not (flags.finetune or saved.is_release)
    if had_state and is_continued and not (saved.folder / DWM_STATE).exists():
        with reported_damage(saved.folder):
            raise DamagedCheckpointError(f"{DWM_STATE}, the state of the weighting, is missing")


def sharding_type(saved: SavedCheckpoint) -> str | None:
    """Return how the distributed optimizer's state was sharded; None if it was another optimizer's.

    Raises:
        UserError: the checkpoint is damaged.
    """
    value = saved.content_metadata.get("distrib_optim_sharding_type")
    return None if value is None else str(value)


def resumed_schedule(
    settings: OptimizerConfig, training: TrainingConfig, batch: int, saved: SavedCheckpoint
) -> Resumed:
    """Return the schedule that the run follows.

    Args:
        batch: the run's global batch size.

    Raises:
        UserError: flags and checkpoint differ, and no flag says which counts.
    """
    flags = Schedule.from_flags(settings, training, batch)
    arguments = vars(saved.arguments)
    state = saved.common["opt_param_scheduler"]
    found, consumed = Schedule.from_checkpoint(state, arguments, flags), int(state["num_steps"])
    return choose_schedule(flags, found, settings, training, batch, arguments.get("global_batch_size", batch), consumed)


def replacing_flags(config: RunConfig, saved: SavedCheckpoint) -> list[str]:
    """Return a line for each flag whose value replaces the checkpoint's."""
    flags, arguments = config.flat(), vars(saved.arguments)
    return [
        f" > {flag_name(name)} {flags[name]} replaces the checkpoint's {arguments[name]}"
        for name in _REPLACING
        if name in arguments
        and arguments[name] != flags[name]
        and _has_effect(name, config.optimizer, config.weighting)
    ]


def overruled_flags(config: RunConfig, saved: SavedCheckpoint, *, has_weighter: bool) -> list[str]:
    """Return a line for each flag that has no effect because the checkpoint's value is kept.

    Args:
        has_weighter: whether the checkpoint has a weighter.
    """
    flags, arguments = config.flat(), vars(saved.arguments)
    initial_flags = dict.fromkeys(_OF_A_NEW_MODEL, "model")
    is_new_run = config.checkpoint.finetune or saved.is_release
    if not (is_new_run or config.checkpoint.no_load_rng) and has_same_layout(config.parallel, saved):
        initial_flags["seed"] = "random state"
    had_scale = arguments.get("fp16") and not arguments.get("loss_scale")
    if config.optimizer.has_dynamic_loss_scale and had_scale and should_load_optimizer(config.checkpoint, saved):
        initial_flags["initial_loss_scale"] = "loss scale"
    if has_weighter and config.weighting.has_trainable_weighter and arguments.get("dwm_mode") in ("bilevel", "rule"):
        initial_flags |= dict.fromkeys(_OF_A_NEW_WEIGHTER, "weighter")
    return [
        f" > {flag_name(name)} {_words(flags[name])} is for a new {what}: the checkpoint's, made with "
        f"{_words(arguments[name])}, is kept"
        for name, what in initial_flags.items()
        if name in arguments and flags[name] not in (None, arguments[name])
    ]


def resume_warnings(config: RunConfig, saved: SavedCheckpoint, train_state: TrainState, weighting: State) -> list[str]:
    """Return a line for each flag that changes the resumed run in a way that is easy to miss.

    Args:
        train_state: the counters of the checkpoint.
        weighting: the weighting's state in it, perhaps empty.
    """
    training, settings, warnings = config.training, config.weighting, []
    run, arguments = config.arguments(), vars(saved.arguments)
    if config.checkpoint.finetune and (difference := differing_flag(run, arguments)):
        warnings.append(f"{difference.partition(';')[0]}: the model computes something else with the same weights")
    lengths = (
        ("train_iters", training.train_iters, train_state.iteration, "iterations"),
        ("train_samples", training.train_samples, train_state.consumed_train_samples, "samples"),
    )
    for name, asked, done, unit in lengths:
        if asked is not None and done > asked and not training.skip_train:
            flag = f"{flag_name(name)} {asked}"
            warnings.append(f"{flag}: the checkpoint has {done} {unit} already, so nothing is trained; give more")
    tokenizer, saved_size = config.tokenizer, arguments.get("vocab_size")
    size = tokenizer.vocab_size if tokenizer.tokenizer_type == "NullTokenizer" else None  # others bring their own size
    has_weighter = settings.dwm_mode == "bilevel" and weighting.get("weighter") is not None
    # A tokenizer of more tokens than the weighter has is refused.
    if size is not None and saved_size is not None and size != saved_size and not (has_weighter and size > saved_size):
        warnings.append(
            f"--vocab-size {size} is not the checkpoint's {saved_size}: documents end with another token than before"
        )
    target, saved_target = settings.dwm_target_data_path, arguments.get("dwm_target_data_path")
    aligned = len(weighting.get("replay") or [])
    if settings.needs_target and aligned and saved_target and target != saved_target:
        warnings.append(
            f"{TARGET_FLAG} {_words(target)} is not the checkpoint's target set, {_words(saved_target)}: the weighter "
            f"also learns from the {aligned} batches of the replay, which were aligned with that one"
        )
    return warnings


def _words(value: Any) -> str:
    if value is None:
        return "the default"
    return " ".join(map(str, value)) if isinstance(value, list) else shortened(value)


def _has_effect(name: str, optimizer: OptimizerConfig, weighting: WeightingConfig) -> bool:
    if name.startswith("dwm_"):
        return weighting.needs_target
    kind = name.partition("_")[0]
    return kind not in ("adam", "sgd") or kind == optimizer.optimizer


def resumed_vocab_size(
    saved: SavedCheckpoint, padded: int, vocab_size: int, given: int | None, tensor_parallel_size: int
) -> int:
    """Return the padded vocabulary size that the model must have to match the checkpoint.

    The padding depends on the TP size, and additional rows would take part in the softmax with untrained
    values.

    Args:
        padded: the padded size that follows from the flags.
        vocab_size: tokens of the tokenizer.
        given: ``--padded-vocab-size``.

    Raises:
        UserError: the checkpoint's rows do not fit the tokenizer or this TP size.
    """
    shape = saved.shapes.get(WORD_EMBEDDINGS)
    if shape is None or shape[0] == padded:
        return padded
    rows = shape[0]
    if given is not None:
        raise UserError(f"--padded-vocab-size {given}: the checkpoint's vocabulary has {rows} rows; leave it out")
    if rows < vocab_size:
        raise UserError(
            f"the tokenizer's {vocab_size} tokens exceed the {rows} rows of the checkpoint's vocabulary; give the "
            "tokenizer that it was trained with"
        )
    if rows % tensor_parallel_size:
        raise UserError(
            f"--tensor-model-parallel-size {tensor_parallel_size}: the {rows} rows of the checkpoint's vocabulary "
            "cannot be divided by it; give another"
        )
    logger.info(f" > the vocabulary is padded to {rows} rows as in the checkpoint, not to {padded}")
    return rows


def check_shapes(saved: SavedCheckpoint, template: Mapping[str, Any], *, should_tolerate_missing: bool = False) -> None:
    """Check each tensor that is to be loaded against the checkpoint's; no communication.

    megatron-core does so for most tensors, but loads embeddings of another size as far as they fit.

    Args:
        template: sharded tensors, nested.
        should_tolerate_missing: whether the checkpoint may lack tensors of the model.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    shapes = saved.shapes
    entries = [
        entry
        for value in nested_values(template)
        for entry in (nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value])
        if isinstance(entry, ShardedTensor)
    ]
    for entry in entries:
        found, expected = shapes.get(entry.key), tuple(entry.global_shape)
        if found is None and should_tolerate_missing and not entry.key.startswith("optimizer."):
            continue  # megatron-core reports it or not, as the flag asks
        if found != expected:
            there = "is missing" if found is None else f"has shape {list(found)}"
            raise UserError(
                f"--load {saved.folder.parent}: {entry.key} {there} in {saved.folder.name}, but this model's has shape "
                f"{list(expected)}; give the flags that the checkpoint was saved with"
            )
