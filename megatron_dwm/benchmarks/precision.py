"""How far the alignments of a bf16 run are from those that fp32 would give, for the same parameters and samples.

    megatron-dwm benchmark precision --json precision.json <flags of pretrain_dwm.py, --bf16>

The run trains plainly for some steps. Then a copy of its model is built in fp32, with the same parameters and Adam
moments, and both align the same samples with the same target samples. What differs is rounding in the passes alone.

Shape legend: n samples of this replica.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from megatron_dwm.analysis.preference import rank_correlation
from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.benchmarks.benchmark_flags import parse_benchmark, without_files
from megatron_dwm.cli.build_trainer import build_trainer
from megatron_dwm.cli.launch import Process, run_program
from megatron_dwm.config.flags import flag, require_at_least
from megatron_dwm.config.run import RunConfig, parse_run
from megatron_dwm.data.batch import Batch
from megatron_dwm.errors import UserError

if TYPE_CHECKING:
    from megatron_dwm.training.setup import LanguageModel
    from megatron_dwm.training.trainer import Trainer

Alignment = Literal["exact", "single-sample", "finite-difference"]
Preconditioner = Literal["adam", "none"]
REFERENCE: tuple[str, Alignment] = ("fp32", "exact")
"""Precision and kind of alignment that the others are compared with."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Precision of alignments."""

    json_file: str | None = flag(None, "Also write the figures to this JSON file.", "--json")
    steps: int = flag(40, "Training steps before the alignments are compared.")
    batches: int = flag(4, "Batches whose alignments are compared.")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps batches")


def parse_precision(argv: Sequence[str] | None, world_size: int) -> tuple[PrecisionConfig, RunConfig]:
    """Parse the benchmark's flags, and those of the run.

    Raises:
        UserError: bad flags, or a run that has no alignments in bf16 to compare.
    """
    options, rest = parse_benchmark(PrecisionConfig, argv, "Compare the alignments of a bf16 run with those in fp32.")
    config = parse_run(rest, world_size)
    if (
        not config.optimizer.bf16
        or not config.weighting.has_trainable_weighter
        or config.parallel.use_distributed_optimizer
    ):
        raise UserError(
            "benchmark precision compares bf16 with fp32 in bilevel mode; give --bf16, and leave out --dwm-mode and "
            "--use-distributed-optimizer"
        )
    if options.steps + options.batches > config.train_iters:
        raise UserError(
            f"--train-iters {config.train_iters} are too few for --steps {options.steps} and --batches "
            f"{options.batches}; raise it"
        )
    return options, without_files(config)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the alignments of a run."""

    def program(process: Process) -> None:
        (options, config), device = process.parse(partial(parse_precision, argv))
        figures = measure(build_trainer(config, device, process), options)
        if process.rank == 0:
            text = json.dumps(figures, indent=2) + "\n"
            print(text, flush=True)
            if options.json_file is not None:
                atomic_write_text(Path(options.json_file), text)
                print(options.json_file, flush=True)

    run_program(program, argv)


def measure(trainer: Trainer, options: PrecisionConfig) -> dict[str, Any]:
    """Train, build the fp32 copy, and compare; every rank calls it."""
    from megatron_dwm.benchmarks.modes import started
    from megatron_dwm.weighting.uniform import UniformWeighting

    plain = trainer.with_weighting(UniformWeighting())
    for iteration in range(1, options.steps + 1):
        plain.train_iteration(iteration)
    weighting = started(trainer.weighting, trainer.config.train_iters)
    engine = trainer.engine
    fp32_model = fp32_copy(trainer)
    models = {
        "bf16": (engine, trainer.components.optimizer),
        "fp32": (fp32_model.engine, fp32_model.components.optimizer),
    }
    found: dict[str, list[dict[str, float]]] = {}
    samples: dict[str, list[float]] = {}
    for _ in range(options.batches):
        batch, target = trainer.dataloaders.train.next_batch(), weighting.target_loader.next_batch()
        for preconditioner in ("adam", "none"):
            by_way = aligned(trainer, models, preconditioner, batch, target)
            reference = by_way[REFERENCE]
            for (precision, way), values in by_way.items():
                name = f"{precision} {way}, preconditioner {preconditioner}"
                found.setdefault(name, []).append(agreement(values, reference))
                samples.setdefault(name, []).extend(values.tolist())
    means = {
        name: {key: statistics.mean(batch[key] for batch in batches) for key in batches[0]}
        | {f"lowest_{key}": min(batch[key] for batch in batches) for key in ("correlation", "rank_correlation")}
        for name, batches in found.items()
    }
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "steps": options.steps,
        "batches": options.batches,
        "samples_of_a_batch": trainer.config.sizes.global_batch_size,
        "parameters": sum(param.numel() for chunk in engine.chunks for param in chunk.parameters()),
        "agreement": means,
        "alignments": samples,
    }


def fp32_copy(trainer: Trainer) -> LanguageModel:
    """Return a language model in fp32 with the parameters and Adam moments of the trainer's, which is in bf16."""
    from megatron_dwm.model.optimizer_parts import optimizer_parts
    from megatron_dwm.model.transformer_config import transformer_config
    from megatron_dwm.runtime.device import current_device
    from megatron_dwm.training.setup import assemble_language_model

    optimizer_config = dataclasses.replace(trainer.config.optimizer, bf16=False)
    config = dataclasses.replace(trainer.config, optimizer=optimizer_config)
    core_config = transformer_config(config.model, config.parallel, config.training, config.optimizer, current_device())
    vocabulary, end = trainer.components.vocabulary, trainer.engine.document_end
    fp32_model = assemble_language_model(config, core_config, vocabulary, trainer.parallel_state, end)
    (bf16_part,), (fp32_part,) = (
        optimizer_parts(trainer.components.optimizer),
        optimizer_parts(fp32_model.components.optimizer),
    )
    with torch.no_grad():
        for chunk, copy in zip(trainer.engine.chunks, fp32_model.engine.chunks, strict=True):
            params: Iterable[Any] = chunk.parameters()
            for param, other in zip(params, copy.parameters(), strict=True):
                other.copy_(param)
                state = bf16_part.optimizer.state[param.main_param]
                fp32_part.optimizer.state[other] = {name: value.detach().clone() for name, value in state.items()}
    return fp32_model


def aligned(
    trainer: Trainer,
    models: dict[str, tuple[Any, Any]],
    preconditioner: Preconditioner,
    batch: Batch,
    target: Batch,
) -> dict[tuple[str, Alignment], torch.Tensor]:
    """Return the alignments [n], float64, on the CPU, by precision and way."""
    from megatron_dwm.weighting.bilevel.lm_gradients import LMGradients

    result: dict[tuple[str, Alignment], torch.Tensor] = {}
    micro = trainer.config.training.micro_batch_size
    ways: tuple[Alignment, ...] = get_args(Alignment)
    for precision, (engine, optimizer) in models.items():
        with engine.full_parameters(), engine.deterministic():
            for way in ways:
                settings = dataclasses.replace(
                    trainer.config.weighting, dwm_alignment=way, dwm_preconditioner=preconditioner
                )
                passes = LMGradients(settings, engine, optimizer, micro)
                _, direction = passes.gradient(target)
                result[precision, way] = passes.align(batch, direction).cpu()
    return result


def agreement(values: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Return how alike two lists of alignments [n] are.

    Returns:
        ``cosine``; ``correlation`` (the cosine after standardizing, which is what a weighter learns from);
        ``rank_correlation``; ``relative_error``, of the norm. A list without spread correlates with nothing: 0.
    """

    def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
        product = float(one.norm() * other.norm())
        return float(one @ other) / product if product > 0 else 0.0

    def centered(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean()

    return {
        "cosine": cosine(values, reference),
        "correlation": cosine(centered(values), centered(reference)),
        "rank_correlation": rank_correlation(values.numpy(), reference.numpy()) or 0.0,
        "relative_error": float((values - reference).norm() / reference.norm()),
    }


if __name__ == "__main__":
    main()
