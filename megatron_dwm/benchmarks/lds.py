"""Whether alignments and scores predict the effect of training on subsets: the linear datamodeling score.

    python benchmarks/lds.py --json lds.json

One run with uniform weights computes the alignments of every batch; another one, with default weighting flags, its
scores. Then models are trained from the same start on random halves of the same samples. The sum of the alignments or
scores of a half predicts its loss on held-out text like the target. The result is the rank correlation over the halves
with an interval, compared with that of random predictions. Runs that have finished are not repeated. Unknown flags are
passed to ``pretrain_dwm.py``.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron_dwm.analysis.preference import rank_correlation
from megatron_dwm.analysis.records import RunRecords, read_run
from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.benchmarks.benchmark_flags import parse_benchmark
from megatron_dwm.benchmarks.benefit import shared_flags, train
from megatron_dwm.benchmarks.mixture import CorpusName, build_mixture
from megatron_dwm.cli.command import run_command
from megatron_dwm.config.flags import flag, require_at_least

BATCH = shlex.split("--global-batch-size 64 --micro-batch-size 64 --eval-interval 100000")
EVERY_BATCH = ["--dwm-num-stages", "1", "--dwm-update-interval", "1"]
SEED = 1  # of the start and of the order of the data, in all runs
_RESAMPLES = 2000  # draws of the bootstrap

Predictions = Mapping[str, Mapping[int, float]]
"""Each predictor's value of each sample, by index: the larger, the lower the loss should become."""


@dataclass(frozen=True)
class LdsConfig:
    """Experiment."""

    output: str = flag("runs/lds", "Folder for data and runs.")
    json_file: str | None = flag(None, "Also write the result to this file.", "--json")
    halves: int = flag(24, "Number of random halves to train on.")
    iterations: int = flag(100, "Training steps of each run.")
    jobs: int | None = flag(None, "Runs at the same time. Default: the number of cores.")
    corpus: CorpusName = flag("library", "Mixture to train on, as for the benchmark benefit.")
    vocab_size: int = flag(400, "Pieces of the tokenizer.")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "iterations jobs vocab_size")
        require_at_least(self, 4, "halves")


@dataclass(frozen=True)
class Score:
    """How well one predictor ranks the halves."""

    correlation: float
    """Spearman's rank correlation of predicted effects and lowered losses."""
    interval: tuple[float, float]
    """95 %, by resampling the halves."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train the runs, or those that are missing, and correlate."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config, run_flags = parse_benchmark(LdsConfig, argv, __doc__)
    folder = Path(config.output)
    mixture = build_mixture(folder, config.corpus, config.vocab_size, clean=False)
    target = ["--dwm-target-data-path", str(mixture.target)]
    # Without a learning rate no weighter learns, and all weights stay 1.
    runs = {
        "uniform": [*target, *EVERY_BATCH, "--dwm-lr", "0"],
        "bilevel": [*target, *EVERY_BATCH],
        **{
            _name(half): ["--dwm-mode", "rule", "--dwm-rule", "half", "--dwm-rule-seed", str(half)]
            for half in range(1, config.halves + 1)
        },
    }

    def run(name: str) -> RunRecords:
        place = folder / "runs" / name
        shared = shared_flags(place, mixture, config.iterations, SEED)
        train(name, place, [*shared, *BATCH, *runs[name], *run_flags])
        return read_run(place)

    with ThreadPoolExecutor(config.jobs or os.cpu_count()) as pool:
        found = dict(zip(runs, pool.map(run, runs), strict=True))
    losses = [found[_name(half)].evaluated("test")[-1]["lm_loss"] for half in range(1, config.halves + 1)]
    scores = correlations(predictions(found["uniform"], found["bilevel"], mixture.like_target), losses)
    print(table(scores, losses))
    if config.json_file:
        by_name = {name: {"correlation": s.correlation, "interval": s.interval} for name, s in scores.items()}
        atomic_write_text(Path(config.json_file), json.dumps({"test_losses": losses, "lds": by_name}, indent=2) + "\n")


def _name(half: int) -> str:
    return f"half-{half}"


def predictions(uniform: RunRecords, bilevel: RunRecords, like_target: Sequence[str]) -> Predictions:
    """Return the two runs' predictions for the samples that they trained on.

    Args:
        uniform: a run with equal weights that aligned every batch.
        bilevel: a run whose weighter learned from every batch, after it had scored it.
        like_target: sources whose samples should help; if there are none, this predictor is left out.
    """
    aligned = _column(uniform, "alignment")
    drawn = np.random.default_rng(0).normal(size=len(aligned))
    found: dict[str, Mapping[int, float]] = {
        "alignments": aligned,
        "scores": _column(bilevel, "score"),
        "losses": _column(uniform, "loss"),
        "random": dict(zip(aligned, drawn.tolist(), strict=True)),
    }
    if like_target:
        source = {
            index: float(name in like_target)
            for update in uniform.updates
            for index, name in zip(update["samples"]["index"], update["samples"]["source"], strict=True)
        }
        found["source"] = source
    return found


def _column(run: RunRecords, name: str) -> dict[int, float]:
    """Return a column of the outer updates' samples, minus its mean in each batch, by index."""
    values: dict[int, float] = {}
    for update in run.updates:
        column = np.array(update["samples"][name], dtype=np.float64)
        values.update(zip(update["samples"]["index"], (column - column.mean()).tolist(), strict=True))
    return values


def correlations(predicted: Predictions, losses: Sequence[float]) -> dict[str, Score]:
    """Return how well each predictor ranks the losses of halves 1, 2, …: those with higher sums should be lower."""
    from megatron_dwm.weighting.rules import half_of_samples  # after the flags: it takes seconds

    lowered = -np.array(losses)
    scores = {}
    for name, values in predicted.items():
        index, value = np.array(list(values)), np.array(list(values.values()))
        sums = np.array([value[half_of_samples(index, half)].sum() for half in range(1, len(losses) + 1)])
        draws = np.random.default_rng(0).integers(len(losses), size=(_RESAMPLES, len(losses)))
        resampled = [_correlation(sums[draw], lowered[draw]) for draw in draws]
        low, high = np.nanquantile(resampled, [0.025, 0.975])
        scores[name] = Score(_correlation(sums, lowered), (float(low), float(high)))
    return scores


def _correlation(sums: np.ndarray, lowered: np.ndarray) -> float:
    rho = rank_correlation(sums, lowered)
    return math.nan if rho is None else rho


def table(scores: Mapping[str, Score], losses: Sequence[float]) -> str:
    """Return a table of the correlations."""
    lines = ["predictor    rank correlation with the lowered loss (95 %)"]
    for name, score in scores.items():
        low, high = score.interval
        lines.append(f"{name:<12} {score.correlation:+.2f} ({low:+.2f} to {high:+.2f})")
    spread = float(np.std(losses, ddof=1))
    lines.append(f"{len(losses)} halves; test losses {np.mean(losses):.4f}, standard deviation {spread:.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
