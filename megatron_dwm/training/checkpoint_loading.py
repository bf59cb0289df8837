"""Loading of checkpoints: model, optimizer, schedule and counters, from either format."""

from __future__ import annotations

import copy
import logging
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_dwm.config.checkpoint import CheckpointConfig
from megatron_dwm.config.run import RunConfig
from megatron_dwm.errors import UserError
from megatron_dwm.runtime.compat import common_state_given
from megatron_dwm.runtime.process_groups import ParallelState
from megatron_dwm.safe_unpickling import restricted_checkpoint_loading, short_reason
from megatron_dwm.training.checkpoint_contents import (
    EVALUATIONS_DUE,
    WEIGHTING_PREFIX,
    data_parallel_group,
    model_key,
    set_rng_state,
    sharded_state,
    trained_parameters,
)
from megatron_dwm.training.lr_schedule import resume_schedule
from megatron_dwm.training.optimizer_state import choose_reader
from megatron_dwm.training.resume_checks import (
    check_shapes,
    has_same_layout,
    replacing_flags,
    resumed_schedule,
    should_load_optimizer,
)
from megatron_dwm.training.saved_checkpoint import SavedCheckpoint, reported_damage
from megatron_dwm.training.torch_format import TorchCheckpoint, load_torch_state
from megatron_dwm.training.train_state import TrainComponents, TrainState
from megatron_dwm.weighting.policy import PER_PARAMETER

logger = logging.getLogger(__name__)


def load_checkpoint(
    config: RunConfig, saved: SavedCheckpoint, components: TrainComponents, parallel_state: ParallelState
) -> tuple[TrainState, dict[str, Any]]:
    """Restore ``components`` from a checkpoint that :func:`check_resume` has passed; every rank calls it.

    Returns:
        the counters that the checkpoint was saved at (zero with ``--finetune``, iteration zero of a release) and the
        weighting's state, empty if there is none.

    Raises:
        UserError: the checkpoint's tensors do not fit the model, or its files are damaged.
    """
    flags = config.checkpoint
    is_new_run = flags.finetune or saved.is_release
    with_optimizer = should_load_optimizer(config.checkpoint, saved)
    with_rng = not (is_new_run or flags.no_load_rng) and _has_rng(saved)
    if with_rng and not has_same_layout(config.parallel, saved):
        logger.info(" > the random state is not loaded: it belongs to another TP or PP size")
        with_rng = False

    with_weighting = config.weighting.has_trainable_weighter and not is_new_run
    if isinstance(saved, TorchCheckpoint):
        state = load_torch_state(saved, components, parallel_state, with_optimizer=with_optimizer)
    else:
        state = _load_distributed(
            flags,
            saved,
            components,
            parallel_state,
            with_optimizer=with_optimizer,
            with_rng=with_rng,
            with_weighting=with_weighting,
        )
    if with_optimizer:
        _resume_schedule(config, saved, components)
    else:
        if not is_new_run:
            reason = "--no-load-optim" if flags.no_load_optim else "the checkpoint holds no optimizer state"
            logger.info(f" > {reason}: optimizer and schedule start from scratch, warm-up included")
        if config.optimizer.fp16 or config.optimizer.bf16:
            components.optimizer.reload_model_params()
    if with_rng:
        set_rng_state(state["rng_state"][0])
    dist.barrier()
    dwm_state = {} if is_new_run else saved.read_dwm_state()
    if with_weighting and (per_parameter := _per_parameter(state, components)):
        dwm_state[PER_PARAMETER] = per_parameter
    return _saved_counters(flags, saved), dwm_state


def _resume_schedule(config: RunConfig, saved: SavedCheckpoint, components: TrainComponents) -> None:
    """Continue the learning rate's schedule, and say which of the checkpoint's values the run's flags replace."""
    resumed = resumed_schedule(config.optimizer, config.training, config.sizes.global_batch_size, saved)
    resume_schedule(components.scheduler, resumed.schedule, saved.common["opt_param_scheduler"]["num_steps"])
    for line in (*resumed.messages, *replacing_flags(config, saved)):
        logger.info(line)


def _saved_counters(flags: CheckpointConfig, saved: SavedCheckpoint) -> TrainState:
    """Return the counters from which a run continues; with ``--finetune`` only the number of operations."""
    operations = saved.common.get("num_floating_point_operations_so_far", 0)
    if flags.finetune:
        return TrainState(num_floating_point_operations_so_far=operations)
    arguments = vars(saved.arguments)
    return TrainState(
        iteration=0 if saved.is_release else saved.common["iteration"],
        consumed_train_samples=arguments.get("consumed_train_samples", 0),
        skipped_train_samples=arguments.get("skipped_train_samples", 0),
        consumed_valid_samples=arguments.get("consumed_valid_samples", 0),
        num_floating_point_operations_so_far=operations,
        evaluations_due=() if saved.is_release else tuple(arguments.get(EVALUATIONS_DUE, ())),
    )


def _per_parameter(state: dict[str, Any], components: TrainComponents) -> dict[str, dict[torch.nn.Parameter, Any]]:
    """Return the weighting's per-parameter tensors in a loaded state, by name and parameter."""
    params = trained_parameters(components)
    return {
        key.removeprefix(WEIGHTING_PREFIX): {param: tensors[str(number)] for number, param in enumerate(params)}
        for key, tensors in state.items()
        if key.startswith(WEIGHTING_PREFIX)
    }


def _load_distributed(
    flags: CheckpointConfig,
    saved: SavedCheckpoint,
    components: TrainComponents,
    parallel_state: ParallelState,
    *,
    with_optimizer: bool,
    with_rng: bool,
    with_weighting: bool,
) -> dict[str, Any]:
    """Load the model, and the optimizer's and the weighting's state, from the format ``torch_dist``; return all of it.

    Raises:
        UserError: the checkpoint's tensors do not fit the model, or its files are damaged.
    """
    metadata = {**saved.content_metadata, "dp_cp_group": data_parallel_group()}
    load = partial(_load_sharded, saved, flags)
    template = sharded_state(
        {},
        components,
        parallel_state,
        metadata,
        is_loading=True,
        with_optimizer=False,
        with_rng=with_rng,
        per_parameter=_empty_per_parameter(saved, components) if with_weighting else {},
    )
    reader = None
    if with_optimizer:
        reader = choose_reader(saved, components, metadata, parallel_state.mp_rank, load)
        template |= reader.template(template)
    check_shapes(saved, template, should_tolerate_missing=flags.should_tolerate_differences)
    state = load(template)
    for number, chunk in enumerate(components.chunks):
        module: Any = chunk
        module.load_state_dict(state[model_key(components, number)], strict=not flags.should_tolerate_differences)
    if reader is not None:
        reader.apply(state)
    return state


def _empty_per_parameter(
    saved: SavedCheckpoint, components: TrainComponents
) -> dict[str, dict[torch.nn.Parameter, torch.Tensor]]:
    """Return empty tensors for the weighting's per-parameter tensors in a checkpoint, by name and parameter."""
    keys = [key.removeprefix(WEIGHTING_PREFIX) for key in saved.shapes if key.startswith(WEIGHTING_PREFIX)]
    names = dict.fromkeys(key.split(".")[0] for key in keys)
    params = trained_parameters(components)
    dtypes = {param: torch.promote_types(param.dtype, torch.float32) for param in params}
    return {name: {param: torch.empty_like(param, dtype=dtypes[param]) for param in params} for name in names}


def _load_sharded(saved: SavedCheckpoint, flags: CheckpointConfig, template: dict[str, Any]) -> dict[str, Any]:
    """Load a template of sharded tensors; every rank calls it.

    Raises:
        UserError: the files are damaged, or differ from the template in a way that ``--dist-ckpt-strictness`` refuses.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

    folder = str(saved.folder)
    strategy = get_default_load_sharded_strategy(folder)
    if flags.ckpt_fully_parallel_load:
        strategy = FullyParallelLoadStrategyWrapper(strategy, data_parallel_group())
    common = common_state_given(lambda: copy.deepcopy(dict(saved.common)))
    with reported_damage(saved.folder), restricted_checkpoint_loading(), common:
        try:
            loaded: Any = dist_checkpointing.load(template, folder, strategy, strict=flags.dist_ckpt_strictness)
        except CheckpointingException as error:
            if not flags.dist_ckpt_strictness.startswith("raise"):
                raise
            raise UserError(
                f"--load {saved.folder.parent}: --dist-ckpt-strictness {flags.dist_ckpt_strictness}: "
                f"{short_reason(error)}; give another strictness, or the flags that the checkpoint was saved with"
            ) from None
    if not flags.dist_ckpt_strictness.startswith("return"):
        return dict(loaded)
    state, missing, unexpected = loaded
    for keys, what in ((missing, "are not in the model"), (unexpected, "are not in the checkpoint")):
        if keys:
            logger.warning(f"--load {saved.folder.parent}: {', '.join(sorted(keys))} {what}")
    return dict(state)


def _has_rng(saved: SavedCheckpoint) -> bool:
    return any(key.startswith("rng_state/") for key in saved.metadata.state_dict_metadata)
