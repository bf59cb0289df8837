"""``megatron-dwm benchmark NAME``: the benchmarks of the package."""

from __future__ import annotations

from megatron_dwm.cli.dispatch import Command, dispatch
from megatron_dwm.errors import run_cli

PROGRAM = "megatron-dwm benchmark"
DESCRIPTION = "Measure what data weighting is worth, and what it costs."
BENCHMARKS = {
    "benefit": Command("megatron_dwm.benchmarks.benefit", "compare the test losses of several weightings"),
    "overhead": Command("megatron_dwm.benchmarks.overhead", "measure time and memory that the weighting costs"),
    "word-order": Command("megatron_dwm.benchmarks.word_order", "see whether a weighter learns what word order tells"),
    "lds": Command("megatron_dwm.benchmarks.lds", "see whether alignments predict what training on samples does"),
    "transfer": Command("megatron_dwm.benchmarks.transfer", "compare the runs of examples/transfer.sh"),
    "scoring": Command("megatron_dwm.benchmarks.scoring", "measure how much of a classifier's speed scoring reaches"),
    "chaos": Command("megatron_dwm.benchmarks.chaos", "kill and starve a run, and compare it with an undisturbed one"),
    "precision": Command("megatron_dwm.benchmarks.precision", "hold alignments in bf16 against those in fp32"),
    "gpu": Command("megatron_dwm.benchmarks.gpu", "measure all that a single GPU can show"),
}


def main() -> None:
    """Run the benchmark that the command line names."""
    run_cli(lambda: dispatch(PROGRAM, BENCHMARKS, DESCRIPTION))


if __name__ == "__main__":
    main()
