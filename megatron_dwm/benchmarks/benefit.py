"""The gain from weighting: language models trained on the same tokens with different weightings, compared on a target.

    python benchmarks/benefit.py --json benefit.json
    python benchmarks/benefit.py --sweep --output runs/sweep
    python benchmarks/benefit.py --ladder --output runs/ladder

A mixture of sources, a target set and a held-out test set of the target's kind are tokenized; then every arm trains the
same model on the same batches, once per seed, one process each. Finished runs are not repeated. Unknown flags
go to ``pretrain_dwm.py``: the model, its training and the weighting can be changed for all arms.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

from megatron_dwm.analysis.records import read_run, records_file
from megatron_dwm.analysis.shares import learned_weights
from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.benchmarks.benchmark_flags import parse_benchmark
from megatron_dwm.benchmarks.benefit_report import Arm, figure, summary, table
from megatron_dwm.benchmarks.mixture import CorpusName, Mixture, blend, build_mixture, build_user_mixture
from megatron_dwm.benchmarks.programs import call
from megatron_dwm.benchmarks.sweep_report import best_arm, sweep_summary, sweep_table
from megatron_dwm.cli.command import run_command
from megatron_dwm.config.flags import flag, require_at_least
from megatron_dwm.data.blend import short_names
from megatron_dwm.errors import UserError
from megatron_dwm.extras import require_packages

logger = logging.getLogger(__name__)

ArmName = Literal[
    "uniform",
    "random",
    "loss",
    "linupper",
    "similarity",
    "source-weights",
    "source-alignment",
    "top-alignment",
    "shuffled",
    "bilevel",
    "bilevel-source-offsets",
    "frozen",
    "continued",
    "oracle",
    "target-only",
]
FROM_ANOTHER_RUN = ("frozen", "continued", "source-weights")
"""Arms that use the result of a bilevel run with another seed: its weighter, or its sources' mean weights."""
WEIGHTER_SEED = 1000
"""Seed of that run, which is never a seed of the arms."""
MAIN_ARMS: tuple[ArmName, ...] = ("uniform", "frozen", "bilevel")
"""Arms of a sweep or ladder, which train each of them several times."""
FACTORS = (0.5, 1.0, 2.0)
"""Of the learning rate in a sweep; of the hidden size in a ladder, whose layers have about 4 times the parameters."""

MODEL = shlex.split(
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.06"
)
# A constant rate, so that the loss at any point of a run is the final loss of a run of that length.
TRAINING = shlex.split(
    "--global-batch-size 128 --micro-batch-size 128 --lr 3e-3 --lr-decay-style constant --lr-warmup-iters 20 "
    "--weight-decay 0.1 --adam-beta2 0.95 --eval-interval 30 --eval-iters 16 --log-interval 10 --num-workers 0"
)
# Default flags, except that a comparison has one stage.
WEIGHTING = ["--dwm-num-stages", "1"]


@dataclass(frozen=True)
class BenefitConfig:
    """Comparison."""

    output: str = flag("runs/benefit", "Folder for data, runs, benefit.json and benefit.png.")
    json_file: str | None = flag(None, "Also write the result to this file.", "--json")
    arms: list[ArmName] | None = flag(
        None, "Weightings to compare; all if not given, and uniform, frozen and bilevel with --sweep and --ladder."
    )
    sweep: bool = flag(
        False, "Train each arm at half, once and twice the learning rate, and compare the arms at their best rates."
    )
    ladder: bool = flag(
        False,
        "Compare the arms at half, once and twice the hidden size; frozen weights are those of the smallest model's "
        "weighter at every size.",
    )
    seeds: int = flag(3, "Runs of each arm.")
    iterations: int = flag(960, "Training steps of each run.")
    jobs: int | None = flag(None, "Runs at the same time. Default: the number of cores.")
    corpus: CorpusName | None = flag(
        None,
        "Mixture to train on: Python's standard library (the default); installed documentation; prose and prose "
        "with its words shuffled (order); registers of English with one of them as the target (speeches, scripture, "
        "glosses, genres); or two archives that both hold all registers, so that no source is better than the other.",
    )
    clean: bool = flag(False, "Train only on the target's source, where there is nothing to gain.")
    data: list[str] = flag(
        [], 'Your own training sources, one file of JSON lines each, such as {"text": "One document."}.'
    )
    mix: list[float] = flag([], "Fractions of the tokens of the --data sources. Default: by size.")
    like: list[str] = flag([], "Sources, by file name without .jsonl, that the oracle trains on.")
    target: str | None = flag(None, "Target set for --data, as JSON lines.")
    test: str | None = flag(None, "Held-out test set for --data, as JSON lines.")
    vocab_size: int = flag(400, "Pieces of the tokenizer.")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "seeds iterations jobs vocab_size")
        if self.sweep and self.ladder:
            raise UserError("--sweep and --ladder are two comparisons; give one of them")
        if not self.data:
            for name in ("mix", "like", "target", "test"):
                if getattr(self, name):
                    raise UserError(f"--{name} goes with --data; leave it out, or name your sources")
            return
        for name in ("clean", "corpus"):
            if getattr(self, name):
                raise UserError(f"--{name} is for the built-in mixtures; leave it out with --data")
        for name in ("target", "test"):
            if getattr(self, name) is None:
                raise UserError(f"--data needs --{name}; give a JSONL file")
        for path in self.texts:
            if not path.is_file():
                raise UserError(f"{path}: no such file; --data, --target and --test take JSONL files")
        if self.mix and len(self.mix) != len(self.data):
            raise UserError(f"--mix has {len(self.mix)} numbers for {len(self.data)} files of --data; give as many")
        unknown = sorted(set(self.like) - {Path(path).stem for path in self.data})
        if unknown:
            raise UserError(f"--like {unknown[0]}: no file of --data has that name; give names without .jsonl")

    @property
    def arm_names(self) -> list[ArmName]:
        """The weightings to compare."""
        return self.arms or list(MAIN_ARMS if self.sweep or self.ladder else get_args(ArmName))

    @property
    def factors(self) -> tuple[float, ...]:
        """Factors of the learning rate, or of the hidden size."""
        return FACTORS if self.sweep or self.ladder else (1.0,)

    @property
    def weighter_factor(self) -> float:
        """The factor of the run whose weighter other runs use."""
        return min(self.factors) if self.ladder else 1.0

    @property
    def texts(self) -> list[Path]:
        """The user's files."""
        return [Path(path) for path in (*self.data, self.target, self.test) if path is not None]


def main(argv: Sequence[str] | None = None) -> None:
    """Train all arms, or those that are missing, and compare them."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config, run_flags = parse_benchmark(BenefitConfig, argv, __doc__)
    require_packages("benchmark benefit", "matplotlib")
    from megatron_dwm.analysis.plots import save_png

    folder = Path(config.output)
    mixture = _mixture(config, folder)
    by_factor = _train_all(config, run_flags, folder, mixture)
    sequence = int(_last_value("--seq-length", [*MODEL, *run_flags]))
    arms = by_factor[1.0]
    if config.sweep:
        result = sweep_summary(by_factor, sequence)
        arms = [best_arm(by_factor, arm.name) for arm in arms]
        print(sweep_table(by_factor, result))
    elif config.ladder:
        result = {f"{factor:g}": summary(rung, sequence) for factor, rung in by_factor.items()}
        arms = by_factor[max(by_factor)]
        for factor, rung in by_factor.items():
            print(f"hidden size x {factor:g}\n{table(rung, result[f'{factor:g}'])}\n")
    else:
        result = summary(arms, sequence)
        print(table(arms, result))
    picture = folder / "benefit.png"
    save_png(figure(arms, sequence), picture)
    written = [folder / "benefit.json", *([Path(config.json_file)] if config.json_file else [])]
    for path in written:
        atomic_write_text(path, json.dumps(result, indent=2) + "\n")
    print(f"{', '.join(map(str, [*written, picture]))}: {len(arms)} arms of {config.seeds} runs")


def _mixture(config: BenefitConfig, folder: Path) -> Mixture:
    if not config.data:
        return build_mixture(folder, config.corpus or "library", config.vocab_size, clean=config.clean)
    *texts, target, test = config.texts
    mixture = build_user_mixture(folder, texts, config.mix, target, test, config.vocab_size)
    names = dict(zip(mixture.train, short_names(list(mixture.train)), strict=True))
    like = {prefix: weight for prefix, weight in mixture.train.items() if names[prefix] in config.like}
    return replace(mixture, like_target=config.like, target_only=like)


def _train_all(config: BenefitConfig, run_flags: list[str], folder: Path, mixture: Mixture) -> dict[float, list[Arm]]:
    """Train every arm with every seed at every factor, several runs at a time; return the arms by factor."""
    is_possible = {
        "oracle": bool(mixture.like_target),
        "target-only": bool(mixture.target_only),
        "bilevel-source-offsets": len(mixture.train) > 1,
    }
    names = [name for name in config.arm_names if is_possible.get(name, True)]
    seeds = range(1, config.seeds + 1)
    jobs = [(name, seed, factor) for seed in seeds for factor in config.factors for name in names]
    first = [job for job in jobs if job[0] not in FROM_ANOTHER_RUN]
    later = [job for job in jobs if job[0] in FROM_ANOTHER_RUN]
    if later:
        first.insert(0, ("bilevel", WEIGHTER_SEED, config.weighter_factor))

    def place(name: str, seed: int, factor: float) -> Path:
        changed = "width" if config.ladder else "lr"
        return folder / "runs" / (f"{name}-{seed}" if factor == 1 else f"{name}-{seed}-{changed}-x{factor:g}")

    def run(job: tuple[ArmName, int, float]) -> None:
        name, seed, factor = job
        flags = [*shared_flags(place(*job), mixture, config.iterations, seed)]
        flags += _arm_flags(name, place(*job), mixture, place("bilevel", WEIGHTER_SEED, config.weighter_factor))
        train(place(*job).name, place(*job), [*flags, *run_flags, *_changed(config, run_flags, factor)])

    with ThreadPoolExecutor(config.jobs or os.cpu_count()) as pool:
        list(pool.map(run, first))
        list(pool.map(run, later))
    return {
        factor: [Arm(name, [read_run(place(name, seed, factor)) for seed in seeds]) for name in names]
        for factor in config.factors
    }


def _changed(config: BenefitConfig, run_flags: list[str], factor: float) -> list[str]:
    """Return the flag that differs between the runs of an arm: the hidden size in a ladder, else the learning rate."""
    if factor == 1:
        return []
    name = "--hidden-size" if config.ladder else "--lr"
    return [name, f"{factor * float(_last_value(name, [*MODEL, *TRAINING, *run_flags])):g}"]


def shared_flags(
    place: Path, mixture: Mixture, iterations: int, seed: int, training: Sequence[str] = TRAINING
) -> list[str]:
    """Return the flags that all arms have in common; only the paths in them differ."""
    return [
        *MODEL,
        *training,
        *("--train-iters", str(iterations), "--seed", str(seed)),
        *mixture.training_flags,
        *("--valid-data-path", str(mixture.test), "--test-data-path", str(mixture.test)),
        *("--metrics-jsonl", str(place / "metrics.jsonl"), "--data-cache-path", str(place / "cache")),
    ]


def _arm_flags(name: ArmName, place: Path, mixture: Mixture, weighter_run: Path) -> list[str]:
    """Return the flags of one arm's weighting.

    Args:
        name: the arm.
        place: the folder of the run.
        mixture: its data.
        weighter_run: the folder of the bilevel run that other arms use.
    """
    bilevel = ["--dwm-target-data-path", str(mixture.target), *WEIGHTING]
    rule = ["--dwm-mode", "rule", "--dwm-rule", name]
    match name:
        case "uniform":
            return ["--dwm-mode", "off"]
        case "target-only":
            return ["--dwm-mode", "off", "--train-data-path", *blend(mixture.target_only)]
        case "bilevel":
            return [*bilevel, "--save", str(place)]
        case "bilevel-source-offsets":
            return [*bilevel, "--dwm-source-offsets"]
        case "frozen":
            return ["--dwm-mode", "frozen", "--dwm-load", _newest_weighter(weighter_run)]
        case "continued":
            return [*bilevel, "--dwm-init-from", _newest_weighter(weighter_run)]
        case "shuffled" | "similarity" | "source-alignment" | "top-alignment":
            return [*bilevel, *rule]
        case "source-weights":
            weights = learned_weights(read_run(weighter_run))
            return [*rule, "--dwm-rule-sources", *weights, "--dwm-rule-weights", *map(str, weights.values())]
        case "oracle":
            return [*rule, "--dwm-rule-sources", *mixture.like_target]
        case _:
            return rule


def _newest_weighter(run: Path) -> str:
    return str(max((run / "weighter").iterdir(), key=lambda path: path.name))


def train(name: str, place: Path, flags: list[str]) -> None:
    """Start a run and wait for its end, unless it has already finished.

    Raises:
        UserError: the run failed, or ``place`` holds a run with other flags.
    """
    command = shlex.join(["pretrain_dwm.py", *flags])
    written = place / "command.txt"
    if records_file(place).is_file() and read_run(place).evaluated("test"):
        if not written.is_file() or written.read_text() != command:
            raise UserError(f"{place} was made with other flags, or other data; give another --output")
        return
    logger.info(f"{name} ...")
    place.mkdir(parents=True, exist_ok=True)
    atomic_write_text(written, command)
    call("pretrain", *flags, log=place / "log.txt")


def _last_value(name: str, argv: Sequence[str]) -> str:
    """Return the last value of a flag."""
    return [value for word, value in pairwise(argv) if word == name][-1]


if __name__ == "__main__":
    main()
