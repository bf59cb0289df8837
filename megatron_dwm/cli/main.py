"""``megatron-dwm COMMAND``: all commands of the package under one name.

The modules of commands are not imported here, so that ``--help`` and ``--version`` answer at once.
"""

from __future__ import annotations

import sys

from megatron_dwm import __version__
from megatron_dwm.cli.dispatch import Command, dispatch
from megatron_dwm.errors import run_cli

PROGRAM = "megatron-dwm"
DESCRIPTION = "Pretrain language models with a data weighting model, and related tools."
COMMANDS = {
    "pretrain": Command("megatron_dwm.cli.pretrain", "pretrain a GPT; --nproc N starts N processes on this machine"),
    "preprocess": Command("megatron_dwm.cli.preprocess", "tokenize JSON lines into Megatron's indexed datasets"),
    "merge-datasets": Command("megatron_dwm.cli.merge_datasets", "merge the indexed datasets of a folder into one"),
    "check-data": Command("megatron_dwm.cli.check_data", "verify every entry and token of datasets"),
    "train-tokenizer": Command("megatron_dwm.cli.train_tokenizer", "train a SentencePiece tokenizer on JSON lines"),
    "build-corpus": Command("megatron_dwm.cli.build_corpus", "build a corpus from installed text"),
    "check-checkpoint": Command("megatron_dwm.cli.check_checkpoint", "verify every tensor and file of checkpoints"),
    "export-hf": Command("megatron_dwm.cli.export_hf", "write a checkpoint's model as a Hugging Face folder"),
    "export-weighter": Command(
        "megatron_dwm.cli.export_weighter", "write a checkpoint's weighter as a Hugging Face folder"
    ),
    "import-hf": Command("megatron_dwm.cli.import_hf", "write a Hugging Face model as a checkpoint"),
    "evaluate": Command("megatron_dwm.cli.evaluate", "compare checkpoints on tasks"),
    "score": Command("megatron_dwm.cli.score", "score documents with a trained weighter"),
    "select": Command("megatron_dwm.cli.select", "select documents within a budget: by score, at random, by source"),
    "blend": Command("megatron_dwm.cli.blend", "print the sources' shares that a run has learned"),
    "report": Command("megatron_dwm.cli.report", "show what a run's weighter prefers, as one HTML page"),
    "plot": Command("megatron_dwm.cli.plot", "plot the losses and weights of a run"),
    "benchmark": Command("megatron_dwm.cli.benchmark", "measure the gain and the cost of weighting"),
}


def main() -> None:
    """Run the command named on the command line."""
    if sys.argv[1:] == ["--version"]:
        print(f"{PROGRAM} {__version__}")
        return
    run_cli(lambda: dispatch(PROGRAM, COMMANDS, DESCRIPTION))


if __name__ == "__main__":
    main()
