"""The schedule of learning rate and weight decay: from the flags or from a checkpoint, and which of the two is used.

megatron-core counts a schedule in samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dwm.config.optimizer import OptimizerConfig
from megatron_dwm.config.training import TrainingConfig
from megatron_dwm.errors import UserError
from megatron_dwm.model.protocols import Optimizer


@dataclass(frozen=True)
class Schedule:
    """A schedule of learning rate and weight decay."""

    max_lr: float
    min_lr: float
    init_lr: float
    """Learning rate at the start of the warm-up."""
    lr_warmup_steps: float
    """Samples of the warm-up."""
    lr_decay_steps: int
    """Samples until the learning rate is at its lowest, warm-up included."""
    lr_decay_style: str
    wsd_decay_steps: int | None
    """Samples of WSD's last phase."""
    lr_wsd_decay_style: str
    start_wd: float
    end_wd: float
    wd_incr_steps: int
    """Samples of the whole run."""
    wd_incr_style: str
    decoupled_lr: float | None = None
    """Learning rate of the embedding and output layers."""
    decoupled_min_lr: float | None = None

    @staticmethod
    def from_flags(settings: OptimizerConfig, training: TrainingConfig, global_batch_size: int) -> Schedule:
        """Return the schedule that the flags describe."""
        is_in_samples = training.train_samples is not None
        bounds = settings.lr_bounds(training.length, global_batch_size, is_in_samples=is_in_samples)
        start_wd, end_wd = settings.weight_decay_range
        return Schedule(
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            init_lr=settings.lr_warmup_init,
            lr_warmup_steps=bounds.warmup,
            lr_decay_steps=bounds.decay,
            lr_decay_style=settings.lr_decay_style,
            wsd_decay_steps=bounds.wsd_decay,
            lr_wsd_decay_style=settings.lr_wsd_decay_style,
            start_wd=start_wd,
            end_wd=end_wd,
            wd_incr_steps=bounds.total,
            wd_incr_style=settings.weight_decay_incr_style,
            decoupled_lr=settings.decoupled_lr,
            decoupled_min_lr=settings.decoupled_min_lr,
        )

    @staticmethod
    def from_checkpoint(state: Mapping[str, Any], arguments: Mapping[str, Any], flags: Schedule) -> Schedule:
        """Return the schedule that a checkpoint was saved with.

        Args:
            state: the schedule's state, as megatron-core saves it.
            arguments: the checkpoint's arguments, for values that the state lacks.
            flags: the flags' schedule, for values that neither contains.
        """
        found = {field.name: state[field.name] for field in dataclasses.fields(Schedule) if field.name in state}
        if "global_batch_size" in arguments:
            found["init_lr"] = arguments.get("lr_warmup_init", flags.init_lr)
            found["lr_wsd_decay_style"] = arguments.get("lr_wsd_decay_style", flags.lr_wsd_decay_style)
            found["decoupled_lr"] = arguments.get("decoupled_lr")
            found["decoupled_min_lr"] = arguments.get("decoupled_min_lr")
            iterations, samples = arguments.get("lr_wsd_decay_iters"), arguments.get("lr_wsd_decay_samples")
            found["wsd_decay_steps"] = (
                iterations * arguments["global_batch_size"] if iterations is not None else samples
            )
        return dataclasses.replace(flags, **found)


def build_scheduler(schedule: Schedule, optimizer: Optimizer) -> Any:
    """Build megatron-core's scheduler for ``optimizer``."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    values = dataclasses.asdict(schedule)
    for of_parameter_groups in ("decoupled_lr", "decoupled_min_lr"):
        del values[of_parameter_groups]
    return OptimizerParamScheduler(optimizer, **values)


def resume_schedule(scheduler: Any, schedule: Schedule, consumed: int) -> None:
    """Continue ``schedule`` after ``consumed`` samples, in the scheduler and in its optimizer's parameter groups.

    megatron-core's loading would keep the highest and lowest learning rate that the checkpoint has for each
    group regardless of the flags, and use the flags' weight decay for one step when it takes the checkpoint's.
    """
    for field in dataclasses.fields(Schedule):
        if hasattr(scheduler, field.name):
            setattr(scheduler, field.name, getattr(schedule, field.name))
    for group in scheduler.optimizer.param_groups:
        is_decoupled = not group.get("default_config", True)
        group["max_lr"], group["min_lr"] = schedule.max_lr, schedule.min_lr
        if is_decoupled and schedule.decoupled_lr is not None:
            group["max_lr"] = schedule.decoupled_lr
            group["min_lr"] = schedule.min_lr if schedule.decoupled_min_lr is None else schedule.decoupled_min_lr
    scheduler.num_steps = consumed
    scheduler.step(increment=0)


@dataclass(frozen=True)
class Resumed:
    """The schedule that a resumed run follows, and the messages to log about it."""

    schedule: Schedule
    messages: tuple[str, ...] = ()


def choose_schedule(
    flags: Schedule,
    saved: Schedule,
    settings: OptimizerConfig,
    training: TrainingConfig,
    global_batch_size: int,
    saved_batch_size: int,
    consumed: int,
) -> Resumed:
    """Return the schedule of a run that resumes from a checkpoint after ``consumed`` samples.

    As in Megatron-LM the two must agree unless a flag says which to use. The length is an exception: a run that is made
    longer or shorter spreads its decay over the new length, unless the flags give the length of the decay.

    Raises:
        UserError: they differ in more than the length.
    """
    unit = global_batch_size if training.train_iters is not None else 1
    differences = _differences(flags, saved, settings, training, unit)
    has_other_batch = unit != 1 and saved_batch_size != global_batch_size
    if not differences:
        return Resumed(flags)
    if settings.override_opt_param_scheduler:
        return Resumed(flags, _rest_of_decay(flags, consumed, unit) if has_other_batch else ())
    if (flags.decoupled_lr is None) != (saved.decoupled_lr is None):
        raise _disagreement(differences["decoupled_lr"])
    if settings.use_checkpoint_opt_param_scheduler:
        distinct = dict.fromkeys(differences.values())  # a length may stand for the decay and for the run
        listed = ", ".join(f"{flag} {found} in place of {value}" for flag, value, found in distinct)
        rest = _rest_of_decay(saved, consumed, unit) if has_other_batch else ()
        return Resumed(saved, (f" > the schedule is the checkpoint's: {listed}", *rest))

    if has_other_batch:
        raise UserError(
            f"--global-batch-size {global_batch_size} is not what the checkpoint was saved with, {saved_batch_size}, "
            "and moves the schedule, which is counted in samples; give --override-opt-param-scheduler to take it "
            "from the flags, or --use-checkpoint-opt-param-scheduler to keep the checkpoint's"
        )
    followed = flags
    if flags.wd_incr_steps != saved.wd_incr_steps:
        del differences["wd_incr_steps"]
        if saved.lr_decay_steps == saved.wd_incr_steps and flags.lr_decay_steps == flags.wd_incr_steps:
            differences.pop("lr_decay_steps", None)
        if settings.lr_warmup_fraction is not None and _is_fraction(saved, settings.lr_warmup_fraction):
            differences.pop("lr_warmup_steps", None)
            followed = dataclasses.replace(flags, lr_warmup_steps=saved.lr_warmup_steps)  # it is over or in progress
    for difference in differences.values():
        raise _disagreement(difference)
    if followed.lr_decay_steps == saved.lr_decay_steps or followed.lr_decay_style == "constant":
        return Resumed(followed)
    name = "--train-iters" if training.train_iters is not None else "--train-samples"
    return Resumed(
        followed,
        (
            f" > {name}: the learning rate decays over {_counted(followed.lr_decay_steps, unit)} instead of the "
            f"checkpoint's {_counted(saved.lr_decay_steps, unit)}; --use-checkpoint-opt-param-scheduler keeps those",
        ),
    )


def _rest_of_decay(schedule: Schedule, consumed: int, batch: int) -> tuple[str, ...]:
    """Return a message on how long the learning rate still decays in a run with another batch size.

    The flags do not show it, because the first iterations had batches of another size.
    """
    if schedule.lr_decay_style == "constant":
        return ()
    done = min(consumed, schedule.lr_decay_steps)
    rest = schedule.lr_decay_steps - done
    return (
        f" > the schedule counts samples: {done} of its {schedule.lr_decay_steps} are done; the learning rate is "
        f"lowest after {rest / batch:g} more iterations",
    )


Difference = tuple[str, Any, Any]
"""A flag, its value, and the checkpoint's value."""


def _differences(
    flags: Schedule, saved: Schedule, settings: OptimizerConfig, training: TrainingConfig, unit: int
) -> dict[str, Difference]:
    """Return the flags whose value is not the checkpoint's, by field of Schedule; lengths in the unit of the flags."""
    suffix = "iters" if training.train_iters is not None else "samples"
    has_decay = getattr(settings, f"lr_decay_{suffix}") is not None
    is_constant_wd = settings.weight_decay_incr_style == "constant"
    names = {
        "max_lr": "--lr",
        "min_lr": "--min-lr",
        "init_lr": "--lr-warmup-init",
        "lr_warmup_steps": f"--lr-warmup-{suffix}" if settings.lr_warmup_fraction is None else "--lr-warmup-fraction",
        "lr_decay_steps": f"--lr-decay-{suffix}" if has_decay else f"--train-{suffix}",
        "lr_decay_style": "--lr-decay-style",
        "wsd_decay_steps": f"--lr-wsd-decay-{suffix}",
        "lr_wsd_decay_style": "--lr-wsd-decay-style",
        "start_wd": "--weight-decay" if is_constant_wd else "--start-weight-decay",
        "end_wd": "--weight-decay" if is_constant_wd else "--end-weight-decay",
        "wd_incr_steps": f"--train-{suffix}",
        "wd_incr_style": "--weight-decay-incr-style",
        "decoupled_lr": "--decoupled-lr",
        "decoupled_min_lr": "--decoupled-min-lr",
    }
    ineffective = set()
    if "WSD" not in (flags.lr_decay_style, saved.lr_decay_style):
        ineffective |= {"wsd_decay_steps", "lr_wsd_decay_style"}
    if flags.lr_warmup_steps == saved.lr_warmup_steps == 0:
        ineffective.add("init_lr")
    differences: dict[str, Difference] = {}
    for field, name in names.items():
        value, found = getattr(flags, field), getattr(saved, field)
        if field in ineffective or value == found:
            continue
        if field.endswith("_steps"):
            value, found = (_counted(steps, unit) for steps in (value, found))
        differences[field] = (name, value, found)
    return differences


def _disagreement(difference: Difference) -> UserError:
    flag, value, found = difference
    return UserError(
        f"{flag} {value} is not what the checkpoint was saved with, {found}; give --override-opt-param-scheduler to "
        "take the schedule from the flags, or --use-checkpoint-opt-param-scheduler to keep the checkpoint's"
    )


def _is_fraction(schedule: Schedule, fraction: float) -> bool:
    return abs(schedule.lr_warmup_steps - fraction * schedule.lr_decay_steps) <= 1


def _counted(steps: float | None, unit: int) -> str:
    """Return a number of samples in iterations of ``unit`` samples, or in samples if it is 1."""
    if steps is None:
        return "nothing"
    return f"{steps:g} samples" if unit == 1 else f"{steps / unit:g} iterations"
