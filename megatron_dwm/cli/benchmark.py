"""``megatron-dwm benchmark NAME``: the benchmarks of the package."""

from __future__ import annotations

from megatron_dwm.cli.dispatch import Command, dispatch
from megatron_dwm.errors import run_cli

PROGRAM = "megatron-dwm benchmark"
DESCRIPTION = "Measure what data weighting is worth, and what it costs."
BENCHMARKS = {
    "benefit": Command("megatron_dwm.benchmarks.benefit", "compare the test losses of several weightings"),
    "overhead": Command("megatron_dwm.benchmarks.overhead", "measure the time and memory of weighting"),
    "word-order": Command("megatron_dwm.benchmarks.word_order", "test whether a weighter can learn from word order"),
    "lds": Command("megatron_dwm.benchmarks.lds", "test whether alignments predict the effect of training"),
    "transfer": Command("megatron_dwm.benchmarks.transfer", "compare the runs of examples/transfer.sh"),
    "scoring": Command("megatron_dwm.benchmarks.scoring", "measure the speed of scoring documents"),
    "chaos": Command("megatron_dwm.benchmarks.chaos", "disturb a run, and compare it with an undisturbed one"),
    "precision": Command("megatron_dwm.benchmarks.precision", "compare alignments in bf16 with those in fp32"),
    "gpu": Command("megatron_dwm.benchmarks.gpu", "run all measurements on one GPU"),
}


def main() -> None:
    """Run the benchmark named on the command line."""
    run_cli(lambda: dispatch(PROGRAM, BENCHMARKS, DESCRIPTION))


if __name__ == "__main__":
    main()
