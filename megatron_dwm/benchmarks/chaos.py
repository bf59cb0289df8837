"""Disturb a training run at random moments, restart it each time, and compare it with an undisturbed run.

    python benchmarks/chaos.py --times 50 --seed 1

A small bilevel run is trained to its end undisturbed. Then it is trained again and again in other folders, and while
ranks train, save, update the weighter or export it, one of them or all are killed, stopped, asked to end, or get the
error of a full disk. The same command then restarts it, until it has finished. At the end its records, its last
checkpoint and its exports must equal those of the undisturbed run bit for bit. After every disturbance the ranks that
are left must have ended within a time limit, with all their child processes, and one of them must have named the rank
that was killed or stopped. Ranks are processes of this machine and compute on its CPU. Unknown flags go to
``pretrain_dwm.py``.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from megatron_dwm.atomic_write import atomic_write_text
from megatron_dwm.benchmarks.benchmark_flags import parse_benchmark
from megatron_dwm.benchmarks.chaos_moments import Kind, Moment, Plan, all_kinds, choose_moment, last_iteration
from megatron_dwm.benchmarks.chaos_report import Configuration, Disturbance, table
from megatron_dwm.cli.command import run_command
from megatron_dwm.config.checkpoint import TRACKER
from megatron_dwm.config.flags import flag, require_at_least
from megatron_dwm.errors import UserError

Layout = Literal["dp2", "tp2-pp2"]
Saves = Literal["sync", "async"]

LAYOUTS: dict[Layout, tuple[int, str]] = {
    "dp2": (2, "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
}
"""Ranks and flags. The distributed optimizer's other format also saves padding, which is uninitialized memory."""
PLAN = Plan(iterations=24, save_interval=4, warmup=4, update_interval=2)
RUN = shlex.split(
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --hidden-dropout 0.1 --attention-dropout 0.1 "
    "--micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --lr-decay-style cosine --lr-warmup-iters 4 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 100 --num-workers 1 --log-interval 1 --eval-iters 1 "
    "--eval-interval 10 --exit-signal-handler --distributed-timeout-minutes 1 --save-retain-interval 8 "
    f"--train-iters {PLAN.iterations} --save-interval {PLAN.save_interval} --dwm-warmup-iters {PLAN.warmup} "
    f"--dwm-update-interval {PLAN.update_interval} --dwm-num-stages 2 --dwm-init-from lm --dwm-num-layers 1 "
    "--dwm-weighter-steps 2"
)
BOUND_SECONDS = 30.0
"""Time limit for ranks to end after one of them was killed, all were asked to end, or the disk was full."""
TIMEOUT_SECONDS = 60.0
"""Timeout of collectives, which is added to the limit for ranks that wait for a stopped one, or at the start."""
CHILDREN_SECONDS = 10.0
"""Time limit for the child processes of an ended rank."""
MAX_RUN_SECONDS = 300.0
"""Time limit for a run to reach the chosen moment, or its end."""


@dataclass(frozen=True)
class ChaosConfig:
    """Disturbances."""

    times: int = flag(4, "Disturbances of each layout with each way of saving.")
    seed: int = flag(1, "Seed of the moments and kinds of the disturbances; the run has another seed.", "--seed")
    layouts: list[Layout] = flag(list(get_args(Layout)), "Ranks and parallelism.")
    saves: list[Saves] = flag(list(get_args(Saves)), "Ways of saving: synchronous or asynchronous.")
    output: str | None = flag(
        None, "New folder for the runs. Default: a temporary one, which is kept only if a check failed."
    )
    json_file: str | None = flag(None, "Also write all disturbances to this file.", "--json")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "times")
        if self.output is not None and Path(self.output).exists():
            raise UserError(f"--output {self.output}: exists already; give another folder, or remove it")


def main(argv: Sequence[str] | None = None) -> None:
    """Disturb runs and compare them; the exit code is 1 if anything was not as it must be."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    config, run_flags = parse_benchmark(ChaosConfig, argv, __doc__)
    folder = Path(config.output or tempfile.mkdtemp(prefix="chaos-"))
    from megatron_dwm.benchmarks.chaos_ranks import preload_modules  # after the flags: this takes seconds

    preload_modules()
    started, results = time.monotonic(), []
    for layout in config.layouts:
        for saves in config.saves:
            results.append(_disturb(config, folder / f"{layout}-{saves}", layout, saves, run_flags))
            print(table(results), flush=True)
            if config.json_file is not None:
                atomic_write_text(Path(config.json_file), json.dumps([asdict(r) for r in results], indent=2) + "\n")
    print(f"{time.monotonic() - started:.0f} seconds")
    if any(result.all_faults for result in results):
        print(f"logs: {folder}")
        raise SystemExit(1)
    if config.output is None:
        shutil.rmtree(folder)


def _disturb(config: ChaosConfig, folder: Path, layout: Layout, saves: Saves, run_flags: list[str]) -> Configuration:
    """Disturb runs of one layout with one way of saving until that has been done often enough.

    Raises:
        UserError: the undisturbed run failed.
    """
    from megatron_dwm.benchmarks.chaos_comparison import differences

    run = _Run(folder, layout, saves, run_flags)
    undisturbed = folder / "undisturbed"
    if run.start(undisturbed).end_undisturbed() != "finished":
        raise UserError(f"the undisturbed run failed; see {run.logs_of(undisturbed)}")
    result = Configuration(layout, saves)
    rng = random.Random(f"{config.seed} {layout} {saves}")
    kinds = all_kinds(rng)
    while len(result.disturbances) < config.times:
        save = folder / f"run{result.runs}"
        result.disturbances += run.disturbed(save, rng, kinds, config.times - len(result.disturbances))
        result.runs += 1
        result.faults += [f"{save.name}: {line}" for line in differences(undisturbed, save, PLAN.iterations)]
    return result


class _Run:
    """A run that can be started any number of times."""

    def __init__(self, folder: Path, layout: Layout, saves: Saves, run_flags: list[str]) -> None:
        self.folder, self.starts = folder, 0
        self.world_size, parallel = LAYOUTS[layout]
        self.argv = [*RUN, *parallel.split(), *(["--async-save"] if saves == "async" else []), *run_flags]

    def logs_of(self, save: Path) -> Path:
        """Return the folder with the output of a run's ranks, one folder per start."""
        return self.folder / f"{save.name}-logs"

    def start(self, save: Path) -> _Start:
        """Start the run, which continues from the checkpoints in its folder."""
        self.starts += 1
        return _Start(self, save, self.logs_of(save) / f"start{self.starts:03d}")

    def disturbed(self, save: Path, rng: random.Random, kinds: Iterator[Kind], maximum: int) -> list[Disturbance]:
        """Disturb a run in ``save`` up to ``maximum`` times, and restart it each time until it has finished."""
        found: list[Disturbance] = []
        kind = next(kinds)
        while True:
            start = self.start(save)
            if len(found) == maximum:
                start.end_undisturbed()  # what is wrong shows in the comparison
                return found
            disturbance = start.disturb(kind, choose_moment(rng, PLAN, _saved_iteration(save)), rng)
            if disturbance is not None:
                found.append(disturbance)
                print(disturbance, flush=True)
                kind = next(kinds)
            if start.status() == "finished" or disturbance is None:
                return found


class _Start:
    """The ranks of one start of a run."""

    def __init__(self, run: _Run, save: Path, logs: Path) -> None:
        from megatron_dwm.benchmarks.chaos_ranks import Ranks

        self.save = save
        self.ranks = Ranks([*run.argv, "--save", str(save), "--load", str(save)], run.world_size, logs)

    def status(self) -> str:
        """Return the status in the run's folder: ``running`` (also after it was killed), or how it ended."""
        path = self.save / "run_status.json"
        return str(json.loads(path.read_text())["status"]) if path.exists() else "none"

    def end_undisturbed(self) -> str:
        """Let the ranks run to their end; return the run's status."""
        self.ranks.wait(MAX_RUN_SECONDS)
        self.ranks.end()
        return self.status()

    def disturb(self, kind: Kind, moment: Moment, rng: random.Random) -> Disturbance | None:
        """Disturb the ranks when the moment has come; None if it came too late, and they ended undisturbed."""
        ranks, last = self.ranks, self.ranks.world_size - 1
        came = ranks.wait_until(lambda: moment.has_come(self.save, ranks.printed(last)), MAX_RUN_SECONDS)
        ranks.wait(moment.delay)
        if not came or None not in ranks.codes:
            ranks.end()
            return None
        victim = rng.randrange(ranks.world_size) if kind in ("kill one", "stop one") else None
        iteration = last_iteration(ranks.printed(last))
        self._apply(kind, victim)
        disturbed_at = time.monotonic()
        found = Disturbance(kind, moment.aim, iteration, victim, moment.delay, self.ranks.logs.name)
        is_starting = iteration == 0 and victim is not None
        bound = BOUND_SECONDS + (TIMEOUT_SECONDS if kind == "stop one" or is_starting else 0.0)
        in_time = ranks.wait(bound, excluded=victim if kind == "stop one" else None)
        found.seconds = round(time.monotonic() - disturbed_at, 2)
        found.codes = ranks.codes
        if not in_time:
            found.faults.append(f"ranks still there after {bound:.0f} s")
        if victim is not None and kind == "stop one":
            ranks.send(victim, signal.SIGKILL)
        elif in_time and (left := ranks.wait_for_children(CHILDREN_SECONDS)):
            found.faults.append(f"processes left after {CHILDREN_SECONDS:.0f} s: {'; '.join(left)}")
        ranks.end()
        found.faults += self._find_faults(found)
        return found

    def _apply(self, kind: Kind, victim: int | None) -> None:
        if victim is not None:
            self.ranks.send(victim, signal.SIGKILL if kind == "kill one" else signal.SIGSTOP)
        elif kind == "full disk":
            self.ranks.limit_files(_half_of_largest_file(self.save.parent / "undisturbed"))
        else:
            self.ranks.send_to_all(signal.SIGKILL if kind == "kill all" else signal.SIGTERM)

    def _find_faults(self, found: Disturbance) -> Iterator[str]:
        """Yield the faults in the ranks' exit codes and messages."""
        texts = [self.ranks.printed(rank) for rank in range(self.ranks.world_size)]
        if found.victim is not None:
            others = "".join(text for rank, text in enumerate(texts) if rank != found.victim)
            at_start = rf"|rank {found.victim} (ended while|was not reached)|ranks? (\d+, )*{found.victim}\b.* did not "
            named = f"rank {found.victim} does not answer" + (at_start if found.iteration == 0 else "")
            if re.search(named, others) is None:
                yield f"no other rank names rank {found.victim}"
        if found.kind == "terminate" and found.iteration > 0 and set(found.codes) != {0}:
            yield f"exit codes {found.codes} after SIGTERM"
        if found.kind == "full disk" and set(found.codes) != {0}:  # it had nothing more to write
            everything = "".join(texts)
            if set(found.codes) != {2} or "Traceback" in everything or "cannot be written" not in everything:
                yield f"exit codes {found.codes}, not one line, on a full disk"


def _saved_iteration(save: Path) -> int:
    tracker = save / TRACKER
    return int(tracker.read_text()) if tracker.exists() else 0


def _half_of_largest_file(save: Path) -> int:
    """Return a file size that logs and records stay below, and a checkpoint exceeds."""
    return max(path.stat().st_size for path in save.glob("iter_*/*.distcp")) // 2


if __name__ == "__main__":
    main()
