"""Tokenize documents to Megatron's indexed datasets; flags and output are those of Megatron-LM's tool.

Each line is an object with the text under the key of --json-keys, such as {"text": "One document."}. Parquet files with
columns of these names are read too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from megatron_dwm.cli.command import run_command
from megatron_dwm.config.flags import parse
from megatron_dwm.config.slurm import SlurmConfig
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.config.unsupported_flags import reason_unsupported
from megatron_dwm.corpora.preprocess import PreprocessConfig, preprocess
from megatron_dwm.data.index_file import IndexFile
from megatron_dwm.extras import require_packages


def main(argv: Sequence[str] | None = None) -> None:
    """Tokenize documents."""
    run_command(partial(_main, argv))


def _main(argv: Sequence[str] | None) -> None:
    classes = {"preprocess": PreprocessConfig, "tokenizer": TokenizerConfig, "slurm": SlurmConfig}
    configs = parse(argv, classes, description=__doc__, reason_unsupported=reason_unsupported)
    # Each worker tokenizes one text at a time; additional threads would only cause warnings about the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    config: PreprocessConfig = configs["preprocess"]
    slurm: SlurmConfig = configs["slurm"]
    if slurm.slurm_partition is None and config.executor == "pool":
        prefixes = preprocess(config, configs["tokenizer"])
    else:
        require_packages("--executor datatrove" if slurm.slurm_partition is None else "--slurm-partition", "datatrove")
        from megatron_dwm.corpora.preprocess_jobs import preprocess_in_tasks

        prefixes, number = preprocess_in_tasks(config, configs["tokenizer"], slurm)
        if number is not None:
            print(f"{config.output_prefix}: submitted job {number}; the same command says when it is done")
            return
    for prefix in prefixes:
        index = IndexFile.open(prefix)
        print(f"{prefix}: {index.num_boundaries - 1:,} documents, {int(index.lengths.sum(dtype='int64')):,} tokens")


if __name__ == "__main__":
    main()
