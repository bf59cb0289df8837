"""What weighting is worth: language models trained on the same tokens under several weightings, compared on a target.

    python benchmarks/benefit.py --json benefit.json

A mixture of sources, a target set and a held-out test set of the target's kind are tokenized; then every arm trains the
same model on the same batches, once a seed, one process each. Runs that have finished are not made again. Unknown flags
go to ``pretrain_dwm.py``: the model, its training and the weighting can be changed for all arms.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from mixture import CORPORA, Mixture, made_mixture, own_mixture
from programs import call

from megatron_dwm.analysis.plots import save_png
from megatron_dwm.analysis.records import RunRecords, read_run
from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.errors import UserError, run_cli

ARMS = ("uniform", "random", "loss", "shuffled", "bilevel", "frozen", "continued", "oracle")
FROM_ANOTHER_RUN = ("frozen", "continued")
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t of n - 1 degrees, two-sided

MODEL = shlex.split(
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.06"
)
# A constant rate: the loss at each point of a run is what a run of that length ends with.
TRAINING = shlex.split(
    "--global-batch-size 128 --micro-batch-size 128 --lr 3e-3 --lr-decay-style constant --lr-warmup-iters 20 "
    "--weight-decay 0.1 --adam-beta2 0.95 --eval-interval 30 --eval-iters 16 --log-interval 10 --num-workers 0"
)
SCORING = shlex.split("--dwm-score-batch-size 128")
# A weighter that is small against this model.
WEIGHTING = [
    *SCORING,
    *shlex.split(
        "--dwm-num-stages 1 --dwm-update-interval 16 --dwm-weighter-steps 8 --dwm-alignment finite-difference "
        "--dwm-hidden-size 16 --dwm-ffn-hidden-size 32 --dwm-num-attention-heads 1"
    ),
]


@dataclass(frozen=True)
class Arm:
    """The runs of one weighting, by seed."""

    name: str
    runs: list[RunRecords]

    @property
    def test_losses(self) -> list[float]:
        return [run.evaluated("test")[-1]["lm_loss"] for run in self.runs]

    @property
    def seconds(self) -> list[float]:
        """Training time of each run, with all that the weighting costs, without evaluations."""
        return [sum(step["seconds"] for step in run.steps) for run in self.runs]

    @property
    def samples(self) -> int:
        return int(self.runs[0].steps[-1]["consumed_samples"])


def main() -> None:
    options, extra = _parse()
    folder = Path(options.output)
    mixture = _mixture(options, folder)
    arms = [name for name in options.arms if name != "oracle" or mixture.like_target]
    seeds = range(1, options.seeds + 1)
    jobs = [(name, seed) for seed in seeds for name in arms if name not in FROM_ANOTHER_RUN]
    later = [(name, seed) for seed in seeds for name in arms if name in FROM_ANOTHER_RUN]
    if later:
        jobs.insert(0, ("bilevel", options.seeds + 1))  # the run whose weighter they use

    def run(job: tuple[str, int]) -> None:
        _run(*job, folder, mixture, options, extra)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, jobs))
        list(pool.map(run, later))
    found = [Arm(name, [read_run(folder / "runs" / f"{name}-{seed}") for seed in seeds]) for name in arms]
    sequence = int(_value("--seq-length", [*MODEL, *extra]))
    result = summary(found, sequence)
    print(table(found, result))
    save_png(figure(found, sequence), folder / "benefit.png")
    for path in filter(None, (options.json, folder / "benefit.json")):
        atomic_write_text(Path(path), json.dumps(result, indent=2) + "\n")


def summary(arms: Sequence[Arm], sequence: int) -> dict[str, Any]:
    """What ``--json`` writes; a ratio that the arms do not give is null.

    ``gap_closed``: of the mean test loss from uniform to oracle, the part that bilevel gains. ``token_ratio`` and
    ``time_ratio``: tokens and training seconds, in parts of what uniform took, at which bilevel's evaluation loss first
    stays at or under uniform's last one; mean over the seeds, null if some seed does not get there.
    """
    by_name = {arm.name: arm for arm in arms}
    losses = {name: statistics.mean(arm.test_losses) for name, arm in by_name.items()}
    gap = tokens = seconds = None
    if {"uniform", "bilevel", "oracle"} <= losses.keys():
        gap = (losses["uniform"] - losses["bilevel"]) / (losses["uniform"] - losses["oracle"])
    if {"uniform", "bilevel"} <= losses.keys():
        pairs = list(zip(by_name["uniform"].runs, by_name["bilevel"].runs, strict=True))
        ratios = [catches_up(uniform, bilevel) for uniform, bilevel in pairs]
        reached = [ratio for ratio in ratios if ratio is not None]
        if len(reached) == len(pairs):
            tokens = statistics.mean(ratio[0] for ratio in reached)
            seconds = statistics.mean(ratio[1] for ratio in reached)
    return {
        "arms": {
            arm.name: {"test_loss": arm.test_losses, "tokens": arm.samples * sequence, "seconds": arm.seconds}
            for arm in arms
        },
        "gap_closed": gap,
        "token_ratio": tokens,
        "time_ratio": seconds,
    }


def catches_up(uniform: RunRecords, other: RunRecords) -> tuple[float, float] | None:
    """When ``other``'s evaluation loss falls to ``uniform``'s last: parts of uniform's tokens, and of its seconds.

    Between evaluations the loss is taken as linear in the tokens. None if it never does.
    """
    goal = uniform.evaluated("valid")[-1]["lm_loss"]
    curve = [(point["iteration"], point["lm_loss"]) for point in other.evaluated("valid")]
    last_above = max((k for k, (_, loss) in enumerate(curve) if loss > goal), default=-1)
    if last_above == len(curve) - 1:
        return None
    iteration = float(curve[0][0])
    if last_above >= 0:
        (before, high), (after, low) = curve[last_above], curve[last_above + 1]
        iteration = before + (after - before) * (high - goal) / (high - low)
    spent = sum(step["seconds"] for step in other.steps if step["iteration"] <= iteration)
    return iteration / uniform.steps[-1]["iteration"], spent / sum(step["seconds"] for step in uniform.steps)


def table(arms: Sequence[Arm], result: dict[str, Any]) -> str:
    """Means with 95 % intervals; differences are taken seed by seed."""
    uniform = next((arm.test_losses for arm in arms if arm.name == "uniform"), None)
    lines = ["arm        test loss            minus uniform        seconds"]
    for arm in arms:
        difference = ""
        if uniform is not None and arm.name != "uniform":
            difference = interval([a - b for a, b in zip(arm.test_losses, uniform, strict=True)])
        mean_seconds = statistics.mean(arm.seconds)
        lines.append(f"{arm.name:<10} {interval(arm.test_losses):<20} {difference:<20} {mean_seconds:.0f}")
    for name, meaning in (
        ("gap_closed", "of the gap from uniform to oracle closed by bilevel"),
        ("token_ratio", "of uniform's tokens until bilevel has its loss"),
        ("time_ratio", "of uniform's time until bilevel has its loss"),
    ):
        value = result[name]
        if value is None and name == "gap_closed":  # there is no oracle, or no bilevel
            continue
        lines.append(f"{'not reached' if value is None else format(value, '.2f')} {meaning}")
    return "\n".join(lines)


def interval(values: Sequence[float]) -> str:
    """Mean and half the width of its 95 % interval by Student's t."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    t = T_95.get(len(values), 2.31)
    return f"{statistics.mean(values):.4f} ± {t * statistics.stdev(values) / len(values) ** 0.5:.4f}"


def figure(arms: Sequence[Arm], sequence: int) -> Any:
    """Evaluation loss of each arm over tokens, and over training time: mean of the seeds, and their range."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 4.5), layout="constrained")
    over_tokens, over_time = drawing.subplots(1, 2, sharey=True)
    for number, arm in enumerate(arms):
        curves = [[point["lm_loss"] for point in run.evaluated("valid")] for run in arm.runs]
        iterations = [point["iteration"] for point in arm.runs[0].evaluated("valid")]
        mean = [statistics.mean(losses) for losses in zip(*curves, strict=True)]
        low, high = ([f(losses) for losses in zip(*curves, strict=True)] for f in (min, max))
        per_iteration = arm.samples * sequence / arm.runs[0].steps[-1]["iteration"]
        seconds = [
            statistics.mean(sum(s["seconds"] for s in run.steps if s["iteration"] <= i) for run in arm.runs)
            for i in iterations
        ]
        color = f"C{number}"
        over_tokens.plot([i * per_iteration / 1e6 for i in iterations], mean, color=color, label=arm.name)
        over_tokens.fill_between([i * per_iteration / 1e6 for i in iterations], low, high, color=color, alpha=0.15)
        over_time.plot(seconds, mean, color=color, label=arm.name)
    over_tokens.set_xlabel("million tokens")
    over_tokens.set_ylabel("loss on held-out text like the target (nats per token)")
    over_time.set_xlabel("seconds of training, all overhead inside")
    over_tokens.legend(frameon=False)
    return drawing


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/benefit", help="folder for data, runs, benefit.json and benefit.png")
    parser.add_argument("--json", help="also write the result to this file")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm")
    parser.add_argument("--iterations", type=int, default=960)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at the same time")
    parser.add_argument("--corpus", choices=CORPORA, help="what the mixture is made of, by default Python's library")
    parser.add_argument("--clean", action="store_true", help="train on the target's source alone: nothing to gain")
    parser.add_argument("--data", nargs="+", metavar="JSONL", help="training sources of your own, one file each")
    parser.add_argument("--mix", nargs="+", type=float, help="their parts of the tokens; by size if not given")
    parser.add_argument("--like", nargs="+", default=[], help="sources, by file name, that the oracle trains on")
    parser.add_argument("--target", metavar="JSONL", help="target set, with --data")
    parser.add_argument("--test", metavar="JSONL", help="held-out test set, with --data")
    parser.add_argument("--vocab-size", type=int, default=400, help="pieces of the tokenizer")
    options, extra = parser.parse_known_args()
    for flag in ("clean", "corpus"):
        if options.data and getattr(options, flag):
            raise UserError(f"--{flag} is about a mixture that is made here; leave it out with --data")
    options.corpus = options.corpus or "library"
    for flag in ("mix", "like", "target", "test"):
        if getattr(options, flag) and not options.data:
            raise UserError(f"--{flag} goes with --data; leave it out, or name your sources")
    if options.data:
        for flag in ("target", "test"):
            if getattr(options, flag) is None:
                raise UserError(f"--data needs --{flag}; give a JSONL file")
        for path in (*options.data, options.target, options.test):
            if not Path(path).is_file():
                raise UserError(f"{path}: no such file; --data, --target and --test take JSONL files")
        if options.mix and len(options.mix) != len(options.data):
            raise UserError(
                f"--mix has {len(options.mix)} numbers for {len(options.data)} files of --data; give as many"
            )
        unknown = sorted(set(options.like) - {Path(path).stem for path in options.data})
        if unknown:
            raise UserError(f"--like {unknown[0]}: no file of --data has that name; give names without .jsonl")
    if options.seeds < 1 or options.jobs < 1:
        raise UserError(f"--seeds {options.seeds} and --jobs {options.jobs} must be at least 1; change them")
    return options, extra


def _mixture(options: argparse.Namespace, folder: Path) -> Mixture:
    if not options.data:
        return made_mixture(folder, options.corpus, options.vocab_size, clean=options.clean)
    texts, parts = [Path(path) for path in options.data], options.mix or []
    mixture = own_mixture(folder, texts, parts, Path(options.target), Path(options.test), options.vocab_size)
    return replace(mixture, like_target=options.like)


def _run(name: str, seed: int, folder: Path, mixture: Mixture, options: argparse.Namespace, extra: list[str]) -> None:
    """Train one arm with one seed, unless that is done.

    ``frozen`` and ``continued`` use the weighter that a bilevel run with another seed ended with.
    """
    place = folder / "runs" / f"{name}-{seed}"
    blend = [word for prefix, part in mixture.train.items() for word in (str(part), prefix)]
    flags = [
        *MODEL,
        *TRAINING,
        *("--train-iters", str(options.iterations), "--seed", str(seed)),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(mixture.tokenizer)),
        *("--train-data-path", *blend),
        *("--valid-data-path", str(mixture.test), "--test-data-path", str(mixture.test)),
        *("--metrics-jsonl", str(place / "metrics.jsonl"), "--data-cache-path", str(place / "cache")),
    ]
    target = ["--dwm-target-data-path", str(mixture.target)]
    learns = [*target, *WEIGHTING]
    if name == "uniform":
        command = ["pretrain_dwm.py", *flags, "--dwm-mode", "off"]
    elif name == "bilevel":
        command = ["pretrain_dwm.py", *flags, *learns, "--save", str(place)]
    elif name in FROM_ANOTHER_RUN:
        weighters = folder / "runs" / f"bilevel-{options.seeds + 1}" / "weighter"
        newest = str(max(weighters.iterdir(), key=lambda path: path.name))
        if name == "frozen":
            command = ["pretrain_dwm.py", *flags, "--dwm-mode", "frozen", "--dwm-load", newest, *SCORING]
        else:
            command = ["pretrain_dwm.py", *flags, *learns, "--dwm-init-from", newest]
    elif name == "shuffled":
        command = ["pretrain_dwm.py", *flags, *learns, *mode_rule(name)]
    else:
        sources = ["--dwm-rule-sources", *mixture.like_target] if name == "oracle" else []
        command = ["pretrain_dwm.py", *flags, *mode_rule(name), *sources]
    command += extra
    written = place / "command.txt"
    if (place / "metrics.jsonl").is_file() and read_run(place).evaluated("test"):
        if not written.is_file() or written.read_text() != shlex.join(command):
            raise UserError(f"{place} was made with other flags, or other data; give another --output")
        return
    print(f"{name}, seed {seed} ...", flush=True)
    place.mkdir(parents=True, exist_ok=True)
    atomic_write_text(written, shlex.join(command))
    call(*command, log=place / "log.txt")


def mode_rule(rule: str) -> list[str]:
    """Return the flags of weights that follow ``rule``."""
    return ["--dwm-mode", "rule", "--dwm-rule", rule]


def _value(flag: str, argv: Sequence[str]) -> str:
    """The last value of ``flag``."""
    return [value for name, value in pairwise(argv) if name == flag][-1]


if __name__ == "__main__":
    run_cli(main)
