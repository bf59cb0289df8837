"""Whether a weighter can learn from word order: can it distinguish text from the same text with shuffled words?

    python benchmarks/word_order.py --json word_order.json

Half of the training data is prose, half is prose whose words are shuffled, and the target is prose. Both halves have
the same words and differ only in their order. A small language model is trained with default weighting flags. At every
outer update, the weights of the batch, on which the weighter has not been trained yet, are compared with the samples'
sources and alignments. Runs that have finished are not repeated. Unknown flags are passed to ``pretrain_dwm.py``.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from megatron_dwm.analysis.records import Record, read_run
from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.benchmarks.benchmark_flags import parse_benchmark
from megatron_dwm.benchmarks.benefit import shared_flags, train
from megatron_dwm.benchmarks.mixture import Mixture, build_mixture
from megatron_dwm.cli.command import run_command
from megatron_dwm.config.flags import flag, require_at_least
from megatron_dwm.config.weighting import WeightingConfig
from megatron_dwm.weighting.weights import standardized

TRAINING = shlex.split(
    "--global-batch-size 64 --micro-batch-size 64 --lr 3e-3 --lr-decay-style constant --eval-interval 120 "
    "--eval-iters 16 --log-interval 20 --num-workers 0"
)


@dataclass(frozen=True)
class WordOrderConfig:
    """Experiment."""

    output: str = flag("runs/word_order", "Folder for data and runs.")
    json_file: str | None = flag(None, "Also write the result to this file.", "--json")
    seeds: int = flag(3, "Runs.")
    first_seed: int = flag(1, "Seed of the first.")
    iterations: int = flag(480, "Training steps of each run.")
    update_interval: int = flag(6, "Iterations between outer updates.")
    jobs: int | None = flag(None, "Runs at the same time. Default: the number of cores.")
    vocab_size: int = flag(1024, "Pieces of the tokenizer.")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "seeds first_seed iterations update_interval jobs vocab_size")


@dataclass(frozen=True)
class Quarter:
    """Means over a quarter of a run's outer updates."""

    first_update: int
    last_update: int
    auc: float
    """Probability that a sample of the target's source has a larger weight than a sample of another source."""
    alignment_auc: float
    """The same of the alignments: what a single update knows of its samples."""
    gain: float
    """Σ w â: the mean alignment under the weights, in standard deviations; 0 for uniform ones."""
    effective_sample_size: float


def main(argv: Sequence[str] | None = None) -> None:
    """Train the runs, or those that are missing, and measure their weights."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config, run_flags = parse_benchmark(WordOrderConfig, argv, __doc__)
    folder = Path(config.output)
    mixture = build_mixture(folder, "order", config.vocab_size, clean=False)
    seeds = range(config.first_seed, config.first_seed + config.seeds)

    def run(seed: int) -> list[Quarter]:
        place = folder / "runs" / f"seed-{seed}"
        train(f"word order, seed {seed}", place, [*_flags(config, place, mixture, seed), *run_flags])
        return quarters(read_run(place).updates, mixture.like_target)

    with ThreadPoolExecutor(config.jobs or os.cpu_count()) as pool:
        by_seed = dict(zip(seeds, pool.map(run, seeds), strict=True))
    test_losses = [read_run(folder / "runs" / f"seed-{seed}").evaluated("test")[-1]["lm_loss"] for seed in seeds]
    print(table(list(by_seed.values()), test_losses))
    if config.json_file:
        runs = [
            {"seed": seed, "test_loss": loss, "quarters": [asdict(quarter) for quarter in found]}
            for (seed, found), loss in zip(by_seed.items(), test_losses, strict=True)
        ]
        atomic_write_text(Path(config.json_file), json.dumps({"runs": runs}, indent=2) + "\n")
        print(config.json_file)
    print(f"{folder / 'runs'}: {len(seeds)} runs")


def _flags(config: WordOrderConfig, place: Path, mixture: Mixture, seed: int) -> list[str]:
    return [
        *shared_flags(place, mixture, config.iterations, seed, TRAINING),
        *("--dwm-target-data-path", str(mixture.target)),
        *("--dwm-update-interval", str(config.update_interval)),
    ]


def quarters(updates: Sequence[Record], like_target: Sequence[str]) -> list[Quarter]:
    """Return the means over each quarter of a run's outer updates.

    Args:
        updates: their records.
        like_target: the sources that should have the larger weights.
    """
    measured = [measure_update(update, like_target) for update in updates]
    bounds = [len(measured) * number // 4 for number in range(5)]
    return [
        Quarter(start + 1, end, *map(statistics.mean, zip(*measured[start:end], strict=True)))
        for start, end in pairwise(bounds)
        if end > start
    ]


def measure_update(update: Record, like_target: Sequence[str]) -> tuple[float, float, float, float]:
    """Return AUC of the weights, AUC of the alignments, Σ w â and effective sample size of one update's batch."""
    samples: dict[str, list[Any]] = update["samples"]
    weights = torch.tensor(samples["weight"], dtype=torch.float64)
    alignments = torch.tensor(samples["alignment"], dtype=torch.float64)
    is_like_target = torch.tensor([source in like_target for source in samples["source"]])
    gain = (weights * standardized(alignments, WeightingConfig(dwm_mode="off").dwm_clip_alignment)).mean()
    return (
        area_under_curve(weights, is_like_target),
        area_under_curve(alignments, is_like_target),
        float(gain),
        float(update["effective_sample_size"]),
    )


def area_under_curve(values: torch.Tensor, is_positive: torch.Tensor) -> float:
    """Return how often a positive's value is above a negative's, ties counting half; 0.5 if one kind is missing."""
    positive, negative = values[is_positive], values[~is_positive]
    if not len(positive) or not len(negative):
        return 0.5
    differences = positive[:, None] - negative
    return float(((differences > 0).double() + (differences == 0).double() / 2).mean())


def table(runs: Sequence[Sequence[Quarter]], test_losses: Sequence[float]) -> str:
    """Return a table of each quarter's means over the runs, with the least AUC of a run."""
    lines = ["updates    AUC of weights (least)   of alignments   Σ w â     effective sample size"]
    for same in zip(*runs, strict=True):
        updates = f"{same[0].first_update}-{same[0].last_update}"
        auc, least = statistics.mean(q.auc for q in same), min(q.auc for q in same)
        single, gain, effective = (
            statistics.mean(getattr(q, name) for q in same)
            for name in ("alignment_auc", "gain", "effective_sample_size")
        )
        scores = f"{auc:.3f} ({least:.3f})"
        lines.append(f"{updates:<10} {scores:<24} {single:<15.3f} {gain:<+9.3f} {effective:.2f}")
    lines.append(f"test loss {statistics.mean(test_losses):.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
