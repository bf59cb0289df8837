"""What data weighting costs: time, throughput and memory of plain, frozen and bi-level training, side by side.

    python benchmarks/overhead.py --json overhead.json
    torchrun --nproc-per-node 4 benchmarks/overhead.py --tensor-model-parallel-size 2 <flags of pretrain_dwm.py>

All modes train one model in one group of processes and take turns, and a ratio is the median over the turns, so that
what else the machine does meets all of them alike. Nothing is saved. A second of a mode is the slowest rank's.

  - plain: the training loop without a weighter (``--dwm-mode off``);
  - bare: megatron-core's schedule, optimizer and learning rate, called by the fewest lines that do it;
  - frozen: the training loop with a weighter that scores;
  - bilevel: frozen steps, and one step with an outer update every ``--dwm-update-interval``. Both are measured; the
    mode's time is their mean over an interval. With ``--steps`` of an interval or more, intervals are also run whole.

Between the turns the parts of a step are timed around the functions that the run itself calls.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import Stopwatch, paired_ratio, peak_and_retained, seconds, take_turns
from modes import SETTLING_STEPS, Modes
from overhead_report import PARTS, table

from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.cli.launch import Process, build_trainer, run_program
from megatron_dwm.config.flags import OneLineParser, add_flags, build, flag, require_at_least
from megatron_dwm.config.run import RunConfig, parse_run
from megatron_dwm.errors import UserError
from megatron_dwm.model.flops import training_flops
from megatron_dwm.model.parameter_copy import ParameterCopy
from megatron_dwm.runtime.device import current_device
from megatron_dwm.training import trainer as training_loop
from megatron_dwm.training.trainer import Trainer
from megatron_dwm.weighting.bilevel.alignment import held_for_all
from megatron_dwm.weighting.flops import outer_update_flops, scoring_flops
from megatron_dwm.weighting.stage_schedule import bilevel_stages

DEFAULT_RUN = (
    "--num-layers 8 --hidden-size 256 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 "
    "--micro-batch-size 2 --global-batch-size 8 --train-iters 3000 --lr 3e-4 --lr-warmup-iters 10 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 4095 --num-workers 0 --eval-iters 0 --log-interval 3000 "
    "--dwm-num-layers 1 --dwm-hidden-size 32"
)
"""The run that is measured if the flags describe no model; its weighter has 1.8 % of the model's parameters."""


@dataclass(frozen=True)
class OverheadConfig:
    """Measuring."""

    json_file: str | None = flag(None, "Also write the figures to this JSON file.", "--json")
    steps: int = flag(2, "Steps of each mode in a turn; from the update interval on, whole intervals are timed too.")
    repeats: int = flag(12, "Turns.")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps repeats")
        if self.json_file is not None and not Path(self.json_file).absolute().parent.is_dir():
            raise UserError(f"--json {self.json_file}: its folder does not exist; make it, or give another file")


def parse_overhead(argv: list[str], world_size: int) -> tuple[OverheadConfig, RunConfig]:
    """The benchmark's own flags, and those of the run that it measures.

    Raises:
        UserError: bad flags, or a run that is not bi-level or too short to be measured.
    """
    parser = OneLineParser(
        prog="overhead.py",
        description="Measure what data weighting costs. All flags of pretrain_dwm.py are taken, too: they describe "
        "the run that is measured, a small one if --num-layers is not among them.",
    )
    add_flags(parser, OverheadConfig)
    own, rest = parser.parse_known_args(argv)
    options = build(OverheadConfig, vars(own))
    if not any(word.split("=")[0] == "--num-layers" for word in rest):
        rest = DEFAULT_RUN.split() + rest
    config = parse_run(rest, world_size)
    if not config.weighting.needs_target:
        raise UserError(f"--dwm-mode {config.weighting.dwm_mode}: all modes are measured; leave the flag out")
    stages = bilevel_stages(config.weighting, config.train_iters)
    if (needed := batches_read(options, stages.update_interval)) > config.train_iters:
        raise UserError(
            f"--train-iters {config.train_iters}: --steps {options.steps} and --repeats {options.repeats} read "
            f"{needed} batches; raise the one or lower the others"
        )
    checkpoint = dataclasses.replace(config.checkpoint, save=None)
    logging = dataclasses.replace(config.logging, metrics_jsonl=None, tensorboard_dir=None)
    return options, dataclasses.replace(config, checkpoint=checkpoint, logging=logging)


def batches_read(options: OverheadConfig, interval: int) -> int:
    """Training batches that measuring reads."""
    whole = options.steps // interval * interval
    turns = options.repeats * (3 * options.steps + 1 + whole + 2)  # two more for the parts
    return SETTLING_STEPS + 1 + turns + 6 + 1  # memory measures three steps twice; one batch for the passes


def measure_modes(modes: Modes, options: OverheadConfig) -> dict[str, Any]:
    """Throughput of the modes, and their ratios to plain's."""
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
    times = take_turns(actions, options.repeats)
    step_times = {name: [t / steps for t in times[name]] for name in ("plain", "bare", "frozen")}
    bilevel = [
        ((interval - 1) * scored + updated) / interval
        for scored, updated in zip(step_times["frozen"], times["update"], strict=True)
    ]
    direct = [t / (steps // interval * interval) for t in times.get("intervals", [])]
    tokens = modes.config.global_batch_size * modes.config.model.sequence
    plain = step_times["plain"]
    return {
        "step_seconds": {
            **{name: statistics.median(values) for name, values in step_times.items()},
            "updating": statistics.median(times["update"]),
            "bilevel": statistics.median(bilevel),
        },
        "plain_tokens_per_s": tokens / statistics.median(plain),
        "bare_ratio": paired_ratio(step_times["bare"], plain),
        "frozen_ratio": paired_ratio(plain, step_times["frozen"]),
        "bilevel_ratio": paired_ratio(plain, bilevel),
        "bilevel_ratio_of_whole_intervals": paired_ratio(plain, direct) if direct else None,
    }


def measure_passes(modes: Modes, repeats: int) -> dict[str, float]:
    """The alignment pass against a plain forward-backward of the same samples."""
    engine, lm_gradients, trainer = modes.bilevel.engine, modes.outer.lm_gradients, modes.bilevel
    batch, micro = trainer.dataloaders.train.next_batch(), modes.config.training.micro_batch

    def forward_backward(size: int) -> None:
        for chunk in engine.chunks:
            chunk.zero_grad_buffer()
        trainer.components.optimizer.zero_grad()
        engine.run(batch, size)

    with engine.full_parameters(), engine.deterministic():
        _, direction = lm_gradients.gradient(batch)
        times = take_turns(
            {
                "align": lambda: lm_gradients.align(batch, direction),
                "single": partial(forward_backward, 1),
                "micro": partial(forward_backward, micro),
            },
            repeats,
        )
    return {
        "alignment_pass_ratio": paired_ratio(times["align"], times["single"]),
        "alignment_pass_ratio_at_micro_batch_size": paired_ratio(times["align"], times["micro"]),
    }


def measured_parts(modes: Modes, repeats: int) -> dict[str, float]:
    """Seconds of each part in a mean bi-level step, of this rank."""
    watch = Stopwatch()
    scored: list[dict[str, float]] = []
    updated: list[dict[str, float]] = []
    with ExitStack() as stack:
        for target, name, part in (
            (training_loop, "train_step", "training step"),
            (modes.weighting, "weigh", "scoring"),
            (modes.frozen.weighting, "weigh", "scoring"),
            (modes.outer.lm_gradients, "gradient", "target pass"),
            (modes.outer.lm_gradients, "align", "alignment pass"),
            (ParameterCopy, "take", "parameter copy"),
            (ParameterCopy, "swap", "parameter copy"),
            (modes.weighter, "step", "weighter steps"),
            (modes.weighter, "score", "weighter steps"),
        ):
            stack.enter_context(watch.around(target, name, part))
        for _ in range(repeats):
            for action, turns in ((partial(modes.frozen.train_iteration, 1), scored), (modes.update, updated)):
                total = seconds(action)
                parts = watch.take()
                turns.append({**parts, "other": total - sum(parts.values())})

    def typical(turns: list[dict[str, float]], part: str) -> float:
        return statistics.median(turn.get(part, 0.0) for turn in turns)

    quiet = modes.interval - 1
    return {part: (quiet * typical(scored, part) + typical(updated, part)) / modes.interval for part in PARTS}


def theoretical_parts(modes: Modes) -> dict[str, float]:
    """Floating-point operations of each part in a mean bi-level step."""
    config, vocab = modes.config, modes.bilevel.reporter.padded_vocab_size
    weighter = modes.weighter.num_computing_parameters
    lm_gradients = outer_update_flops(config, vocab, 0)
    target = training_flops(config.model, vocab, config.target_batch_size)
    return dict.fromkeys(PARTS, 0.0) | {
        "training step": training_flops(config.model, vocab, config.global_batch_size),
        "scoring": scoring_flops(weighter, config.global_batch_size, config.model.sequence),
        "target pass": target / modes.interval,
        "alignment pass": (lm_gradients - target) / modes.interval,
        "weighter steps": (outer_update_flops(config, vocab, weighter) - lm_gradients) / modes.interval,
    }


def measure_shares(modes: Modes, repeats: int) -> dict[str, dict[str, float]]:
    """Each part's share of a bi-level run's time, as measured (mean over the ranks) and by operations."""
    own = measured_parts(modes, repeats)
    summed = torch.tensor(list(own.values()), dtype=torch.float64, device=current_device())
    dist.all_reduce(summed)
    shares = {"measured": dict(zip(own, summed.tolist(), strict=True)), "theoretical": theoretical_parts(modes)}
    return {kind: {part: x / sum(parts.values()) for part, x in parts.items()} for kind, parts in shares.items()}


def measure_memory(modes: Modes) -> dict[str, Any]:
    """Bytes of the rank on which an outer update takes most above a plain step; ratios in copies of that rank."""

    def replayed() -> int:
        return sum(aligned.tokens.untyped_storage().nbytes() for aligned in modes.outer.replay)

    plain, _ = peak_and_retained(partial(modes.plain.train_iteration, 1))
    weighted, _ = peak_and_retained(partial(modes.frozen.train_iteration, 1))
    modes.outer.replay.clear()  # so that an update adds its samples, and lets go of none that came before
    updating, retained = peak_and_retained(modes.update)
    added = replayed() // len(modes.outer.replay)
    parameters: list[Any] = [param for chunk in modes.bilevel.engine.chunks for param in chunk.parameters()]
    copy_of_parameters = sum(param.nbytes for param in parameters)
    copy_of_gradients = sum(param.main_grad.nbytes for param in parameters)
    own = {
        "exact": torch.cuda.is_available() or dist.get_world_size() == 1,
        "parameter_copy_bytes": copy_of_parameters,
        "gradient_copy_bytes": copy_of_gradients,
        "weighter_bytes": weighter_bytes(modes),
        "replay_bytes": replayed(),
        "plain_step_bytes": plain,
        "weighted_step_bytes": weighted,
        "outer_update_bytes": updating,
        "weighted_step_above_plain_bytes": weighted - plain,
        "outer_update_above_plain_bytes": updating - plain,
        "retained_after_update_bytes": retained - added,
        "outer_update_above_plain_copies": (updating - plain) / (copy_of_parameters + copy_of_gradients),
    }
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return max(found, key=lambda rank: rank["outer_update_above_plain_copies"])


def weighter_bytes(modes: Modes) -> int:
    """What the weighter holds between updates: parameters, their gradients, its optimizer's state."""
    moments = [x for state in modes.weighter.optimizer.state.values() for x in state.values()]
    parameters = list(modes.weighter.model.parameters())
    gradients = [param.grad for param in parameters if param.grad is not None]
    return sum(tensor.nbytes for tensor in (*parameters, *gradients, *moments))


def weighter_part(modes: Modes) -> float:
    """The weighter's parameters as a part of the language model's."""
    parallel_state, total = (
        modes.bilevel.parallel_state,
        torch.zeros((), dtype=torch.int64, device=current_device()),
    )
    for chunk in modes.bilevel.engine.chunks:
        total += sum(param.numel() for param in chunk.parameters() if held_for_all(param, parallel_state))
    dist.all_reduce(total, group=parallel_state.mp_group)
    return modes.weighter.num_parameters / int(total)


def measure(trainer: Trainer, options: OverheadConfig) -> dict[str, Any]:
    """All figures; every rank calls it."""
    modes = Modes(trainer)
    figures = measure_modes(modes, options) | measure_passes(modes, options.repeats)
    shares = measure_shares(modes, options.repeats)
    return figures | {
        "theoretical_bilevel_ratio": shares["theoretical"]["training step"],
        "weighter_part": weighter_part(modes),
        "update_interval": modes.interval,
        "peak_memory": measure_memory(modes),
        "shares": shares,
    }


def main() -> None:
    def program(process: Process) -> None:
        (options, config), device = process.parse(partial(parse_overhead, sys.argv[1:]))
        figures = measure(build_trainer(config, device, process), options)
        if process.rank == 0:
            print(table(figures), flush=True)
            if options.json_file is not None:
                atomic_write_text(Path(options.json_file), json.dumps(figures, indent=2) + "\n")

    run_program(program)


if __name__ == "__main__":
    main()
