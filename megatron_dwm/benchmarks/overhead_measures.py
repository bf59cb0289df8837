"""Measures of ``benchmarks/overhead.py``: throughput of the modes, time of the parts of a step, memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, get_args, get_type_hints

import torch
import torch.distributed as dist

from megatron_dwm.benchmarks.device_counts import device_counts
from megatron_dwm.benchmarks.measuring import Stopwatch, paired_ratio, peak_and_retained, seconds, time_in_turns
from megatron_dwm.benchmarks.modes import Modes
from megatron_dwm.benchmarks.overhead_flags import ALIGNMENT_TURNS, OverheadConfig
from megatron_dwm.benchmarks.overhead_report import PARTS
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.model.flops import training_flops
from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.runtime.device import current_device
from megatron_dwm.training import trainer as training_loop
from megatron_dwm.training.trainer import Trainer
from megatron_dwm.weighting.bilevel.alignment import is_counting_rank
from megatron_dwm.weighting.bilevel.lm_gradients import LMGradients
from megatron_dwm.weighting.flops import outer_update_flops, scoring_flops


def measure_modes(modes: Modes, options: OverheadConfig) -> dict[str, Any]:
    """Measure the throughput of the modes, and their ratios to plain's."""
    steps, interval = options.steps, modes.interval

    def repeated(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(steps):
                step()

        return run

    actions: dict[str, Callable[[], Any]] = {
        "plain": repeated(partial(modes.plain.train_iteration, 1)),
        "bare": repeated(modes.bare.step),
        "frozen": repeated(partial(modes.frozen.train_iteration, 1)),
        "update": modes.update,
    }
    if steps >= interval:
        actions["intervals"] = partial(modes.intervals, steps // interval)
    times = time_in_turns(actions, options.repeats, options.clock)
    step_times = {name: [t / steps for t in times[name]] for name in ("plain", "bare", "frozen")}
    bilevel = [
        ((interval - 1) * scored + updated) / interval
        for scored, updated in zip(step_times["frozen"], times["update"], strict=True)
    ]
    direct = [t / (steps // interval * interval) for t in times.get("intervals", [])]
    tokens = modes.config.sizes.global_batch_size * modes.config.model.seq_length
    plain = step_times["plain"]
    return {
        "step_seconds": {
            **{name: statistics.median(values) for name, values in step_times.items()},
            "updating": statistics.median(times["update"]),
            "bilevel": statistics.median(bilevel),
        },
        "turns": step_times | {"updating": times["update"]},
        "plain_tokens_per_s": tokens / statistics.median(plain),
        "bare_ratio": paired_ratio(step_times["bare"], plain),
        "frozen_ratio": paired_ratio(plain, step_times["frozen"]),
        "bilevel_ratio": paired_ratio(plain, bilevel),
        "bilevel_ratio_of_whole_intervals": paired_ratio(plain, direct) if direct else None,
    }


def measure_alignments(modes: Modes, options: OverheadConfig) -> dict[str, list[float]]:
    """Measure the seconds of an iteration with an outer update under each way of alignment, turn by turn.

    They differ by factors, and single samples can take many times as long as a step: two turns are enough.
    """
    outer, chosen = modes.outer, modes.lm_gradients
    ways = get_args(get_type_hints(WeightingConfig)["dwm_alignment"])

    def update(passes: LMGradients) -> None:
        outer.alignment_pass.lm_gradients = passes
        modes.update()

    passes = {way: chosen.with_config(replace(chosen.config, dwm_alignment=way)) for way in ways}
    actions: dict[str, Callable[[], Any]] = {way: partial(update, passes[way]) for way in ways}
    try:
        for action in actions.values() if torch.cuda.is_available() else ():  # at first, kernels may be compiled
            action()
        return time_in_turns(actions, ALIGNMENT_TURNS, options.clock)
    finally:
        outer.alignment_pass.lm_gradients = chosen


def measure_counts(modes: Modes) -> dict[str, dict[str, int]]:
    """Count the kernel launches, reads and waits of a step of each mode, on this rank's device."""
    return {
        "bare": device_counts(modes.bare.step),
        "plain": device_counts(partial(modes.plain.train_iteration, 1)),
        "frozen": device_counts(partial(modes.frozen.train_iteration, 1)),
        "updating": device_counts(modes.update),
    }


def described(modes: Modes) -> dict[str, Any]:
    """Return what was measured: the device, and the operations of a step."""
    config, vocab = modes.config, modes.bilevel.components.vocabulary.rows
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "world_size": config.world_size,
        "micro_batch_size": config.training.micro_batch_size,
        "global_batch_size": config.sizes.global_batch_size,
        "target_batch_size": config.sizes.target_batch_size,
        "parameters": sum(param.numel() for chunk in modes.bilevel.engine.chunks for param in chunk.parameters()),
        "weighter_parameters": modes.weighter.num_parameters,
        "alignment": config.weighting.dwm_alignment,
        "training_flops": training_flops(config.model, vocab, config.sizes.global_batch_size),
    }


def measure_passes(modes: Modes, options: OverheadConfig) -> dict[str, list[float]]:
    """Measure the seconds of an alignment pass, and of a plain forward-backward of the same samples."""
    engine, lm_gradients, trainer = modes.bilevel.engine, modes.outer.lm_gradients, modes.bilevel
    batch, micro = trainer.dataloaders.train.next_batch(), modes.config.training.micro_batch_size

    def forward_backward() -> None:
        for chunk in engine.chunks:
            chunk.zero_grad_buffer()
        trainer.components.optimizer.zero_grad()
        engine.run(batch, micro)

    with engine.full_parameters(), engine.deterministic():
        direction = {param: v.clone() for param, v in lm_gradients.gradient(batch)[1].items()}
        actions: dict[str, Callable[[], Any]] = {
            "alignment pass": lambda: lm_gradients.align(batch, direction),
            "forward-backward": forward_backward,
        }
        return time_in_turns(actions, options.repeats, options.clock)


def measured_parts(modes: Modes, options: OverheadConfig) -> dict[str, float]:
    """Measure the seconds of each part in a mean bilevel step, on this rank."""
    watch = Stopwatch(options.clock)
    scored: list[dict[str, float]] = []
    updated: list[dict[str, float]] = []
    with ExitStack() as stack:
        for target, name, part in (
            (training_loop, "train_step", "training step"),
            (modes.weighting, "weigh", "scoring"),
            (modes.frozen.weighting, "weigh", "scoring"),
            (modes.outer.lm_gradients, "gradient", "target pass"),
            (modes.outer.lm_gradients, "align", "alignment pass"),
            (ParameterCopy, "store", "parameter copy"),
            (ParameterCopy, "swap", "parameter copy"),
            (ParameterCopy, "restore", "parameter copy"),
            (modes.weighter, "step", "weighter steps"),
            (modes.weighter, "score", "weighter steps"),
        ):
            stack.enter_context(watch.around(target, name, part))
        for _ in range(options.repeats):
            for action, turns in ((partial(modes.frozen.train_iteration, 1), scored), (modes.update, updated)):
                total = seconds(action, options.clock)
                parts = watch.take()
                turns.append({**parts, "other": total - sum(parts.values())})

    def typical(turns: list[dict[str, float]], part: str) -> float:
        return statistics.median(turn.get(part, 0.0) for turn in turns)

    quiet = modes.interval - 1
    return {part: (quiet * typical(scored, part) + typical(updated, part)) / modes.interval for part in PARTS}


def operations(modes: Modes) -> dict[str, float]:
    """Return the floating-point operations of the parts of a step, and of those of an update."""
    config, vocab = modes.config, modes.bilevel.components.vocabulary.rows
    weighter = modes.weighter.num_active_parameters
    update_flops = partial(outer_update_flops, config.model, config.weighting, config.sizes, vocab)
    lm_gradients = update_flops(0)
    target = training_flops(config.model, vocab, config.sizes.target_batch_size)
    whole = update_flops(weighter, is_linear=modes.weighter.is_linear)
    return {
        "training step": training_flops(config.model, vocab, config.sizes.global_batch_size),
        "scoring": scoring_flops(weighter, config.sizes.global_batch_size, config.model.seq_length),
        "target pass": target,
        "alignment pass": lm_gradients - target,
        "weighter steps": whole - lm_gradients,
    }


def theoretical_parts(modes: Modes) -> dict[str, float]:
    """Return the floating-point operations of each part in a mean bilevel step."""
    every_step = ("training step", "scoring")
    parts = {part: n / (1 if part in every_step else modes.interval) for part, n in operations(modes).items()}
    return dict.fromkeys(PARTS, 0.0) | parts


def measure_fractions(modes: Modes, options: OverheadConfig) -> dict[str, dict[str, float]]:
    """Return each part's fraction of a bilevel run's time, as measured (mean over the ranks) and by operations."""
    on_rank = measured_parts(modes, options)
    summed = torch.tensor(list(on_rank.values()), dtype=torch.float64, device=current_device())
    dist.all_reduce(summed)
    spent = {"measured": dict(zip(on_rank, summed.tolist(), strict=True)), "theoretical": theoretical_parts(modes)}
    return {kind: {part: x / sum(parts.values()) for part, x in parts.items()} for kind, parts in spent.items()}


def measure_memory(modes: Modes) -> dict[str, Any]:
    """Measure the bytes of the rank on which an outer update takes most above a plain step.

    Ratios are relative to that rank's copies of the parameters and of the gradients.
    """

    def replay_bytes() -> int:
        tokens = sum(aligned.tokens.untyped_storage().nbytes() for aligned in modes.outer.replay.batches)
        return tokens + modes.outer.learner.kept_bytes

    plain, _ = peak_and_retained(partial(modes.plain.train_iteration, 1))
    weighted, _ = peak_and_retained(partial(modes.frozen.train_iteration, 1))
    modes.outer.replay.batches.clear()  # so that an update adds its samples, and frees no earlier ones
    updating, retained = peak_and_retained(modes.update)
    added = replay_bytes() // len(modes.outer.replay)
    parameters: list[Any] = [param for chunk in modes.bilevel.engine.chunks for param in chunk.parameters()]
    copy_of_parameters = sum(param.nbytes for param in parameters)
    copy_of_gradients = sum(param.main_grad.nbytes for param in parameters)
    on_rank = {
        "exact": torch.cuda.is_available() or dist.get_world_size() == 1,
        "parameter_copy_bytes": copy_of_parameters,
        "gradient_copy_bytes": copy_of_gradients,
        "weighter_bytes": weighter_bytes(modes),
        "replay_bytes": replay_bytes(),
        "plain_step_bytes": plain,
        "weighted_step_bytes": weighted,
        "outer_update_bytes": updating,
        "weighted_step_above_plain_bytes": weighted - plain,
        "outer_update_above_plain_bytes": updating - plain,
        "retained_after_update_bytes": retained - added,
        "outer_update_above_plain_copies": (updating - plain) / (copy_of_parameters + copy_of_gradients),
    }
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, on_rank)
    largest: dict[str, Any] = max(found, key=lambda rank: rank["outer_update_above_plain_copies"])
    return largest


def weighter_bytes(modes: Modes) -> int:
    """Return the bytes that the weighter holds between updates: parameters, gradients, its optimizer's state."""
    moments = [x for state in modes.weighter.optimizer.state.values() for x in state.values()]
    parameters = list(modes.weighter.model.parameters())
    gradients = [param.grad for param in parameters if param.grad is not None]
    return sum(tensor.nbytes for tensor in (*parameters, *gradients, *moments))


def weighter_part(modes: Modes) -> float:
    """Return the weighter's number of parameters as a fraction of the language model's."""
    parallel_state = modes.bilevel.parallel_state
    total = torch.zeros((), dtype=torch.int64, device=current_device())
    for chunk in modes.bilevel.engine.chunks:
        total += sum(param.numel() for param in chunk.parameters() if is_counting_rank(param, parallel_state))
    dist.all_reduce(total, group=parallel_state.mp_group)
    return modes.weighter.num_parameters / int(total)


def measure(trainer: Trainer, options: OverheadConfig) -> dict[str, Any]:
    """Measure everything; every rank calls it."""
    modes = Modes(trainer)
    figures = measure_modes(modes, options) | {"passes": measure_passes(modes, options)}
    fractions = measure_fractions(modes, options)
    figures |= {"update_seconds": measure_alignments(modes, options), "device_counts": measure_counts(modes)}
    return (
        figures
        | described(modes)
        | {
            "clock": options.clock,
            "intervals": options.intervals,
            "operations": operations(modes),
            "weighter_part": weighter_part(modes),
            "update_interval": modes.interval,
            "peak_memory": measure_memory(modes),
            "shares": fractions,
        }
    )
